"""The masks that a module expects its caller to make: causal, in the ways people write them.

Shapes: B batch, T query length, S key length (cached + T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# How a mask says "may look there", from what it may look at (T, S). What is added comes last: in modules that compute
# -1e9 · (1 - mask) it hides the right keys, and drowns all scores.
_STYLES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "keep": lambda keep, dtype: keep,  # bool, True where it may look
    "hide": lambda keep, dtype: ~keep,  # bool, True where it may not
    "ones": lambda keep, dtype: keep.to(dtype),  # 1 where it may look, else 0
    "add": lambda keep, dtype: torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf),
}


class CausalMask(NamedTuple):
    """How a module wants the causal mask that its caller makes."""

    style: str  # of _STYLES
    dims: int  # (T, S), (1, T, S) or (1, 1, T, S)

    def make(self, T: int, start: int, like: Tensor) -> Tensor:
        """The mask of T tokens after ``start`` others, in the dtype and on the device of ``like``."""
        positions = torch.arange(start + T, device=like.device)
        keep = positions <= positions[start:, None]
        return _STYLES[self.style](keep, like.dtype)[(None,) * (self.dims - 2)]


CAUSAL_MASKS = tuple(CausalMask(style, dims) for dims in (2, 3, 4) for style in _STYLES)


def causal_block_mask(module: nn.Module, T: int) -> Any:
    """flex attention's mask of T queries over the module's whole cache; gpt-fast shifts it by the position itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    device = str(next(module.parameters()).device)
    return create_block_mask(causal, 1, 1, T, module.max_seq_length, device=device)  # type: ignore[arg-type]
