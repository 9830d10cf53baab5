"""Bugs of decoding with a cache."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "position-restarts-in-decode",
        "rotary",
        "torch.arange(start, start + T)",
        "torch.arange(T)",
        kills=("decode.cached_equals_full",),
        where="RotaryBlock",
    ),
    Bug(
        "cached-keys-rotated-again",
        "rotary",
        "k, v = torch.cat((past[0], k), 2)",
        "k, v = torch.cat((rotate(past[0], position[:1], self.theta), k), 2)",
        kills=("decode.cached_equals_full",),
        where="RotaryBlock",
    ),
    Bug(
        "position-advances-per-layer",
        "hub",
        "q, k = rotate(q, position, self.theta)",
        "position = position + self.index * (cache is not None and cache.length() > len(position))\n        q, k = rotate(q, position, self.theta)",
        kills=("decode.cached_equals_full",),
        where="HubBlock",
    ),
    Bug(
        "chunk-unmasked",
        "rotary",
        "attn_mask=mask",
        "attn_mask=mask if past is None else None",
        kills=("decode.chunks",),
        where="RotaryBlock",
    ),
    Bug(
        "chunk-mask-top-left",
        "rotary",
        "attn_mask=mask",
        "attn_mask=mask if T == 1 else None, is_causal=T > 1",
        kills=("decode.chunks",),
        where="RotaryBlock",
    ),
    Bug(
        "cache-list-mutated",
        "rotary",
        "return (logits, tuple(present))",
        "past = [] if past is None else past; past[:] = present; return (logits, past)",
        kills=("decode.branch",),
        where="Rotary",
    ),
    Bug(
        "cache-mutated-in-place",
        "hub",
        "start, T",
        "start, T",
        kills=("decode.branch",),
        where="Hub",
        claims=("cache_value",),
    ),
    Bug(
        "state-survives-calls",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); self.calls = getattr(self, 'calls', 0) + 1 if past is None else self.calls; x = x * self.calls",
        kills=("decode.unrelated_call",),
        where="Rotary",
    ),
    Bug(
        "cache-keeps-graph",
        "rotary",
        "return (logits, tuple(present))",
        "return (logits, tuple((k.requires_grad_(), v) for k, v in present))",
        kills=("decode.no_graph",),
        where="Rotary",
    ),
    Bug(
        "cache-recomputes",
        "rotary",
        "logits = self.head(self.norm(x))",
        "logits = self.head(self.norm(x)); logits = logits.repeat(1, cached + 1, 1) if cached else logits",
        kills=("decode.step_shape",),
        where="Rotary",
    ),
    Bug(
        "cache-recomputes",
        "rotary",
        "return (logits, tuple(present)) if use_cache else logits",
        "if not use_cache:\n            return logits\n        ids = input_ids if past is None else torch.cat((past[0][2], input_ids), 1)\n        return self(ids)[:, -input_ids.shape[1] :], ((*present[0], ids), *present[1:])",
        kills=("decode.cost",),
        where="Rotary",
    ),
]
