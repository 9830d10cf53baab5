"""Bugs that only narrow types show."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "rope-low-precision",
        "rotary",
        "position[:, None] * frequency",
        "position[:, None].to(x.dtype) * frequency.to(x.dtype)",
        kills=("numerics.bfloat16_near_float64",),
        where="rotate",
    ),
    Bug(
        "rmsnorm-overflow-half",
        "hub",
        "x.float() if x.dtype in (torch.float16, torch.bfloat16) else x",
        "x",
        kills=("numerics.large_activations_finite",),
        where="RMSNorm",
    ),
]
