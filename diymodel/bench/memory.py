"""Peak memory of a computation, by counting the tensors that live at once.

It is the same on every device, on the meta device too, and knows nothing of what a kernel takes inside, of the
allocator's rounding, or of tensors that were there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by one call of ``run`` hold at once, its result included."""
    watch = _Watch()
    with torch.no_grad(), watch:
        run()
    return watch.peak


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: Any = WeakIdKeyDictionary()  # storage -> bytes, 0 for those that were there before
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._note(args, made=False)
        self._note(kwargs, made=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, made=True)
        self.peak = max(self.peak, sum(self._bytes.values()))
        return out

    def _note(self, values: Any, made: bool) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self._bytes:
                self._bytes[storage] = storage.nbytes() if made else 0
