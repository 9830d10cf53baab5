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
    return usable_device(name)


def usable_device(device: str | torch.device) -> torch.device:
    """This device, once it is known to hold values.

    Raises:
        ValueError: there is no such device, or it is "meta", which holds shapes alone.
    """
    try:
        found = torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    if found.is_meta:
        raise ValueError(f"device={str(device)!r} cannot be used: it holds shapes and no values")
    return torch.device(device)


def choose_autocast(dtype: str, hidden_size: int, device: torch.device) -> torch.dtype | None:
    """The type to autocast to, for ``TrainConfig.dtype``; None: compute in float32.

    "auto" is bfloat16 on CUDA, and on a CPU that has instructions for it (AVX512-BF16) once the matrices are large
    enough to outweigh the casts. Measured on an Intel Xeon (AMX), one thread, torch 2.13, 4 layers, 16 rows of 128, in
    tokens a second, first float32 and then bfloat16: hidden size 32: 33,400 and 30,900; 64: 17,300 and 22,900; 96:
    11,300 and 15,800; 128: 8,100 and 12,400.
    """
    if dtype == "auto":
        faster = device.type == "cuda" or (device.type == "cpu" and hidden_size >= 64 and cpu_has_bfloat16())
        return torch.bfloat16 if faster else None
    return torch.bfloat16 if dtype == "bfloat16" else None
