"""What a call picks by size, as a router picks experts, kept for a call of the same module in another dtype.

Where two are almost as good, rounding decides between them, and the token's output is another expert's: far off, and
no sign of a bug.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_DIMENSION = {"topk": 2, "sort": 1, "max": 1}  # which argument it is
_PLACES = {"argmax", "argsort"}
_COMPARISONS = {f"{before}{name}{before}" for name in ("ge", "gt", "le", "lt") for before in ("", "__")}

_Kept = dict[tuple[Any, ...], list[Tensor]]  # by operation and shape, in the order of the calls


class _Choices(TorchFunctionMode):
    """Notes places that are picked, and comparisons with a number that was; or puts those of another call there.

    Args:
        put: those of the other call, or None.
    """

    def __init__(self, put: _Kept | None = None) -> None:
        super().__init__()
        self.put = put
        self.seen: _Kept = defaultdict(list)
        self.picked: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in _PLACES and isinstance(args[0], Tensor) and args[0].is_floating_point():
            return self._kept(name, result)
        if name in _COMPARISONS and isinstance(result, Tensor) and any(map(self._is_picked, args)):
            return self._kept(name, result)
        if name not in _DIMENSION or isinstance(result, Tensor) or not result[0].is_floating_point():
            return result
        places = self._kept(name, result[1])
        if places is not result[1]:
            at = _DIMENSION[name]
            dim = args[at] if len(args) > at else kwargs.get("dim", -1)
            dropped = places.dim() < args[0].dim()
            values = args[0].gather(dim, places.unsqueeze(dim) if dropped else places)
            result = type(result)((values.squeeze(dim) if dropped else values, places))
        self.picked.append(result[0])
        return result

    def _kept(self, name: str, own: Tensor) -> Tensor:
        key = name, *own.shape
        self.seen[key].append(own)
        others = [] if self.put is None else self.put.get(key, [])
        at = len(self.seen[key]) - 1
        return others[at] if at < len(others) and not others[at].equal(own) else own

    def _is_picked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and any(
            value.untyped_storage().data_ptr() == picked.untyped_storage().data_ptr() for picked in self.picked
        )


def with_choices_of(other: Callable[[], object], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run``, but what it picks by size is what ``other`` picks there."""
    with _Choices() as kept:
        other()

    def forced() -> Tensor:
        with _Choices(kept.seen):
            return run()

    return forced
