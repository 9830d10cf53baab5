"""Bugs that any forward pass shows: shapes, state, rows that meet, too long input."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug("masked-row-nan", "nanogpt", ".tril())", ".tril(-1))", kills=("shape.logits",), where="NanoBlock"),
    Bug(
        "position-table-clamped",
        "plain",
        "randn(config.max_seq_len",
        "randn(config.max_seq_len - 1",
        kills=("shape.longest",),
        where="Plain",
    ),
    Bug(
        "dropout-active-in-eval",
        "nanogpt",
        "weights = F.dropout(scores.softmax(-1), self.dropout, self.training)",
        "weights = F.dropout(scores.softmax(-1), self.dropout)",
        kills=("forward.deterministic",),
        where="NanoBlock",
    ),
    Bug(
        "state-survives-calls",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); x = x + getattr(self, 'kept', 0); self.kept = x.mean().item()",
        kills=("forward.deterministic",),
        where="Rotary",
    ),
    Bug(
        "inputs-written-in-place",
        "hub",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); input_ids[input_ids == 1] = 0",
        kills=("forward.inputs_unchanged",),
        where="Hub",
    ),
    Bug(
        "statistic-over-batch",
        "plain",
        "self.embed(x) +",
        "self.embed(x) - self.embed(x).mean(0) +",
        kills=("batch.row_alone",),
        where="Plain",
    ),
    Bug(
        "cache-rows-shared",
        "rotary",
        "k.repeat_interleave(self.groups, 1)",
        "k[:1].repeat_interleave(self.groups, 1).expand_as(q[:, :, :1].expand(B, self.heads, k.shape[2], self.size))",
        kills=("batch.permutation",),
        where="RotaryBlock",
    ),
    Bug(
        "position-table-clamped",
        "plain",
        "self.positions[:T]",
        "self.positions[torch.arange(T).clamp(max=len(self.positions) - 1)]",
        kills=("context.overlong_refused",),
        where="Plain",
    ),
    Bug(
        "generation-overflow",
        "rotary",
        "if cached + input_ids",
        "if input_ids",
        kills=("context.overlong_refused",),
        where="Rotary",
    ),
]
