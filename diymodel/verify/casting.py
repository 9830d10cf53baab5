"""A module in another dtype."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def cast(module: Module, dtype: torch.dtype, device: str | None = None, buffers: bool = True) -> Module:
    """``module.to(device, dtype)``, but what is complex stays complex, such as a table of rotary positions.

    ``Module.to`` drops the imaginary parts, with no more than a warning, and what is left turns nothing.

    Args:
        buffers: whether they go to the dtype as well.
    """
    as_built = set() if buffers else {id(buffer) for buffer in module.buffers()}

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(device, torch.promote_types(dtype, torch.complex64))
        return tensor.to(device, dtype if tensor.is_floating_point() and id(tensor) not in as_built else None)

    module._apply(convert)  # type: ignore[no-untyped-call]
    return module
