"""Bugs on every path alike, which only another implementation with the same weights can show."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "attention-scale-wrong",
        "rotary",
        "attn_mask=mask",
        "attn_mask=mask, scale=1.0",
        kills=("reference.logits",),
        where="RotaryBlock",
        reference=True,
    ),
    Bug(
        "attention-scale-wrong",
        "nanogpt",
        "/ math.sqrt(k.shape[-1])",
        "/ math.sqrt(C)",
        kills=("reference.logits",),
        where="NanoBlock",
        reference=True,
    ),
    Bug(
        "rope-pairing-convention",
        "rotary",
        "a, b = x[..., :half], x[..., half:]\n    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)",
        "a, b = x[..., 0::2], x[..., 1::2]\n    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)",
        kills=("reference.logits",),
        where="rotate",
        reference=True,
    ),
    Bug(
        "gqa-head-order",
        "rotary",
        "k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)",
        "k.repeat(1, self.groups, 1, 1), v.repeat(1, self.groups, 1, 1)",
        kills=("reference.logits",),
        where="RotaryBlock",
        reference=True,
    ),
    Bug(
        "heads-mixed-by-reshape",
        "hub",
        "y.transpose(1, 2).reshape(B, T, d)",
        "y.reshape(B, T, d)",
        kills=("reference.logits",),
        where="HubBlock",
        reference=True,
    ),
    Bug(
        "activation-wrong",
        "hub",
        "F.silu(",
        "F.gelu(",
        kills=("reference.logits",),
        where="HubBlock",
        reference=True,
    ),
    Bug(
        "no-positions",
        "rotary",
        "position[:, None] * frequency",
        "0 * position[:, None] * frequency",
        kills=("reference.logits",),
        where="rotate",
        reference=True,
    ),
    Bug(
        "mask-hides-self",
        "hub",
        "torch.arange(start + T) <= position[:, None]",
        "torch.arange(start + T) < position[:, None].clamp(min=1)",
        kills=("reference.logits",),
        where="Hub",
        reference=True,
    ),
]
