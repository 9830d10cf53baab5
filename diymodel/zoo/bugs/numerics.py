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
    Bug(
        "softmax-overflow-half",
        "hub",
        "scores = scores.masked_fill(~allowed, torch.finfo(x.dtype).min)",
        "scores = scores + (~allowed).to(x.dtype) * torch.tensor(-1e9, dtype=x.dtype)",
        kills=("numerics.large_activations_finite",),
        where="HubBlock",
    ),
    Bug(
        "norm-of-zeros-nan",
        "rotary",
        " + self.eps",
        "",
        kills=("numerics.zeros_finite",),
        where="RMSNorm",
    ),
    Bug(
        "norm-of-zeros-nan",
        "hub",
        "(wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()",
        "1 / (wide.norm(dim=-1, keepdim=True) * wide.shape[-1] ** -0.5)",
        kills=("numerics.zeros_finite",),
        where="RMSNorm",
    ),
]
