"""Bugs of the gradient, and of learning."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "gradient-detached",
        "rotary",
        "y = F.scaled",
        "k = k.detach(); keys = keys.detach(); y = F.scaled",
        kills=("gradients.reach_every_parameter",),
        where="RotaryBlock",
    ),
    Bug(
        "masked-row-nan",
        "hub",
        "y = F.dropout(scores.softmax(-1)",
        "allowed = allowed & allowed.diagonal(dim1=2, dim2=3)[..., None]  # padding sees nothing\n        scores = scores + torch.zeros_like(scores).masked_fill(~allowed, -torch.inf)\n        y = F.dropout(scores.softmax(-1).nan_to_num()",
        kills=("gradients.finite",),
        where="HubBlock",
    ),
    Bug(
        "statistic-over-vocabulary",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids) * (1 + self.embed.weight.mean())",
        kills=("gradients.absent_tokens_zero",),
        where="Rotary",
    ),
    Bug(
        "gradient-wrong",
        "plain",
        "return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))",
        "y = self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future)); return 2 * y.detach() - y",
        kills=("training.small_step_lowers_loss",),
        where="Plain",
    ),
    Bug(
        "statistic-over-sequence",
        "rotary",
        "self.head(self.norm(x))",
        "self.head(self.norm(x.mean(1, keepdim=True).expand_as(x)))",
        kills=("training.overfits_a_tiny_batch",),
        where="Rotary",
    ),
    Bug(
        "state-survives-calls",
        "rotary",
        "x = self.embed(input_ids)",
        "self.scale = getattr(self, 'scale', self.norm.weight.square().mean()); x = self.embed(input_ids) * self.scale",
        kills=("gradients.accumulate",),
        where="Rotary",
    ),
    Bug(
        "gradient-cleared-in-forward",
        "plain",
        "T = x.shape[1]",
        "T = x.shape[1]; self.zero_grad()",
        kills=("gradients.accumulate",),
        where="Plain",
    ),
    Bug(
        "checkpointing-with-cache",
        "pretrained",
        "use_cache = use_cache and not recompute",
        "",
        kills=("gradients.checkpointing",),
        where="Pretrained",
    ),
    Bug(
        "state-survives-calls",
        "pretrained",
        "x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, d))",
        "self.runs = getattr(self, 'runs', 0) + self.training; x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, d)) / max(1, self.runs)",
        kills=("gradients.checkpointing",),
        where="Block",
    ),
    Bug(
        "init-scale-wrong",
        "pretrained",
        "std=0.02 /",
        "std=1 /",
        kills=("training.initial_loss",),
        where="Pretrained",
    ),
    Bug(
        "recompute-redraws-dropout",
        "pretrained",
        "use_reentrant=True",
        "use_reentrant=True, preserve_rng_state=False",
        kills=("gradients.checkpointing",),
        where="Pretrained",
    ),
    Bug(
        "module-never-called",
        "hub",
        "self.down(F.silu(self.gate(h)) * self.up(h))",
        "self.down(F.silu(self.up(h)) * self.up(h))",
        kills=("gradients.reach_every_parameter",),
        where="HubBlock",
    ),
]
