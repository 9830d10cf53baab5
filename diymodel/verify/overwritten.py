"""Which lines write over a value that the backward pass needs: torch names its operation and its shape, and no line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from diymodel.verify.failure import CheckFailure, own_line
from diymodel.verify.held import tensors_in
from diymodel.verify.registry import Check
from diymodel.verify.trial import Trial

OVERWRITTEN = "saved-tensor-overwritten"
_SAID = re.compile(
    r"modified by an inplace operation: \[torch\.[\w.]*(?:Float|Double|Half|BFloat16)Tensor \[([\d, ]*)\]"
)


def says_overwritten(message: str) -> bool:
    """Whether it is of a backward pass that found a value it needs written over; ids and labels are the caller's."""
    return _SAID.search(message) is not None


def written_by(check: Check, trial: Trial, failure: CheckFailure) -> str:
    """The lines of the subject that write to tensors of the shape that torch names, or else to any; '' where none does.

    Args:
        trial: the one that failed, of which the recorded values are run again.
    """
    writes = _Writes()
    again = Trial.replaying(trial.subject, trial.values, trial.device)
    again.around = lambda start, length: writes
    with contextlib.suppress(Exception):  # it is known to fail
        again.run(check.function)
    named = _SAID.search(failure.message)
    shape = named and tuple(int(size) for size in named[1].split(", ") if size)
    lines = [line for line, written in writes.found if written == shape] or [line for line, _ in writes.found]
    return " or ".join(dict.fromkeys(lines))


class _Writes(TorchFunctionMode):
    """Notes each operation that changes a tensor it was given: the stranger's line, and the tensor's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [(tensor, _version(tensor)) for tensor in tensors_in((args, kwargs or {}))]
        result = function(*args, **kwargs or {})
        changed = [tensor for tensor, version in given if _version(tensor) != version]
        if changed and (line := own_line()):
            self.found += [(line, tuple(tensor.shape)) for tensor in changed]
        return result


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
