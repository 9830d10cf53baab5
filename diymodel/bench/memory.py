"""Peak memory of a computation, beyond what was there before.

On CUDA the allocator knows. On a CPU the tensors that live at once are counted, which is the same on every run, and
knows nothing of what a kernel takes inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diymodel._compat import DispatchMode


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that one call of ``run`` holds at once, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    watch = _Watch()
    with torch.no_grad(), watch:
        run()
    return watch.peak


class _Watch(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
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
