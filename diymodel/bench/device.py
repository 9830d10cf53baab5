"""Where a measurement runs."""

from __future__ import annotations

import torch


def choose(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run; on a CPU from here on one thread.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: skipped, torch sees no CUDA device here")
    if device == "cpu":
        torch.set_num_threads(1)
    chosen: torch.dtype = getattr(torch, dtype)
    return torch.device(device), chosen
