"""Where in a module the first number arises that is none, or too large for its type."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diymodel.verify.adapters import LM


class _FirstOverflow(TorchFunctionMode):
    """Notes the first operation that makes a NaN or +infinity of numbers. -infinity is what masks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []  # the parts that are being called, outermost first
        self.found: str | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if self.found is None and _overflowed(result) and not any(map(_overflowed, given)):
            part = next((name for name in reversed(self.inside) if name), "")
            self.found = f"{getattr(function, '__name__', 'an operation')}{f' in {part}' if part else ''}"
        return result


def _overflowed(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and bool((value.isnan() | (value == torch.inf)).any())
    )


def first_overflow(module: nn.Module, call: Callable[[], object]) -> str | None:
    """The operation, and the part of the module, such as "pow in layers.0.norm"; None where it cannot be told."""
    watch = _FirstOverflow()
    handles = []

    def leave(*_: Any) -> None:  # what a hook returns takes the place of the output
        watch.inside.pop()

    with contextlib.suppress(Exception):  # what takes no hooks, or fails by now, is told without the place
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(lambda *_, name=name: watch.inside.append(name)))
            handles.append(part.register_forward_hook(leave))
        with watch:
            call()
    for handle in handles:
        handle.remove()
    return watch.found


def where_first(lm: LM, ids: Tensor) -> str:
    """What to look at, as the end of a sentence, if numbers overflow on the way to the logits."""
    with torch.no_grad():
        place = first_overflow(lm.module, lambda: lm.logits(ids))
    return "" if place is None else f"; the first NaN or infinity comes out of {place}"
