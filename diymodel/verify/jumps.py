"""Functions that jump, such as rounding: where the last bit decides on which side, and where a gradient is no slope.

Quantised models round weights and activations in forward, and let gradients pass straight through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_JUMPING = {"round", "floor", "ceil", "trunc", "sign", "sgn"}
_NEAR = 2.0**12  # times the type's epsilon, of the largest number beside it: no further does rounding carry


class _Jumps(TorchFunctionMode):
    """Notes what functions that jump are given.

    Args:
        other_side: whether they give what they would just across a jump that is near.
    """

    def __init__(self, other_side: bool = False) -> None:
        super().__init__()
        self.other_side = other_side
        self.given: list[Tensor] = []
        self.near = False  # whether any jump was

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if getattr(function, "__name__", "") not in _JUMPING or not args[0].is_floating_point() or not args[0].numel():
            return result
        self.given.append(args[0].detach().clone())
        if not self.other_side:
            return result
        reach = _NEAR * torch.finfo(args[0].dtype).eps * self.given[-1].abs().max()
        below, above = (function(args[0] + far, *args[1:], **kwargs) for far in (-reach, reach))
        self.near |= bool((below != above).any())
        return torch.where(result == below, above, below)


def across_near_jumps(run: Callable[[], Tensor]) -> Tensor | None:
    """What ``run()`` gives with every jump that rounding may decide decided otherwise; None where there is none."""
    with _Jumps(other_side=True) as jumps:
        result = run().detach()
    return result if jumps.near else None


def jumps_move(run: Callable[[], object], change: Callable[[], object]) -> bool:
    """Whether what functions that jump are given in ``run()`` is another after a change."""
    given = []
    for before in (lambda: None, change):
        before()
        with _Jumps() as jumps:
            run()
        given.append(jumps.given)
    return any(one.shape == other.shape and not one.equal(other) for one, other in zip(*given, strict=False))
