"""Bugs that show once the module is compiled."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "mask-dropped-on-fast-path",
        "rotary",
        "attn_mask=mask",
        "attn_mask=None if torch.compiler.is_compiling() else mask",
        kills=("compile.agrees",),
        where="RotaryBlock",
    ),
    Bug(
        "recompile-per-step",
        "rotary",
        "cached = past[0][0].shape[2] if past is not None else 0",
        "cached = past[0][0].shape[2] if past is not None else 0\n        self.calls = getattr(self, 'calls', 0) + 1",
        kills=("compile.no_recompile_per_step",),
        where="Rotary",
    ),
    Bug(
        "recompile-per-step",
        "kept",
        "start = 0 if past_key_values is None else past_key_values[0].shape[3]",
        "start = 0 if past_key_values is None else past_key_values[0].shape[3]\n        self.calls = getattr(self, 'calls', 0) + 1",
        kills=("compile.no_recompile_per_step",),
        where="Kept",
    ),
]
