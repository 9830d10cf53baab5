"""What each call of a module is handed, seen and changed on its way in, whoever makes the call: its own generate too.

Shapes: B batch, T tokens of a call, S cached and new tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.adapters import LM

Arguments = dict[str, Any]  # of forward, by name


@contextlib.contextmanager
def handed(lm: LM, change: Callable[[Arguments], None]) -> Iterator[None]:
    """Each call of the module gets its arguments as ``change`` leaves them."""
    signature = inspect.signature(lm.module.forward)

    def on_call(module: Any, args: tuple[Any, ...], kwargs: Arguments) -> tuple[tuple[Any, ...], Arguments]:
        bound = signature.bind(*args, **kwargs)
        change(bound.arguments)
        return bound.args, bound.kwargs

    hook = lm.module.register_forward_pre_hook(on_call, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Calls:
    """The calls of one generation, each with how many tokens are cached before it.

    Args:
        real: (B, T) of the prompt, False at padding; what is new is real.
    """

    def __init__(self, lm: LM, real: Tensor) -> None:
        self.lm = lm
        self.real = real
        self.number = 0
        self._end = 0

    def start(self, arguments: Arguments) -> int:
        """How many tokens the cache of this call holds."""
        past = self.lm.convention.past
        start = self._end if past is not None and arguments.get(past) is not None else 0
        self._end = start + arguments[self.lm.convention.ids].shape[1]
        self.number += 1
        return start

    def covered(self, start: int, length: int) -> Tensor:
        """Which of the cached and new tokens are real, (B, S)."""
        lacking = start + length - self.real.shape[1]
        return F.pad(self.real, (0, lacking), value=True) if lacking > 0 else self.real[:, : start + length]


def right_positions(calls: Calls, arguments: Arguments) -> None:
    """Hand over each token's position among the real ones of its row."""
    convention, ids = calls.lm.convention, arguments[calls.lm.convention.ids]
    start = calls.start(arguments)
    assert convention.positions is not None
    positions = (calls.covered(start, ids.shape[1]).long().cumsum(1) - 1).clamp(min=0)[:, start:]
    arguments[convention.positions] = positions[0] if convention.positions_are_shared else positions


def right_mask(calls: Calls, arguments: Arguments) -> None:
    """Hand over a mask that tells of the prompt's padding and of nothing else."""
    convention, ids = calls.lm.convention, arguments[calls.lm.convention.ids]
    start = calls.start(arguments)
    covered = calls.covered(start, ids.shape[1])
    covered = covered if convention.mask_covers_cache else covered[:, start:]
    assert convention.mask is not None
    arguments[convention.mask] = (~covered if convention.mask_marks_padding else covered).to(convention.mask_dtype)


def fed_to_cache(lm: LM, generate: Callable[[], Tensor], real: Tensor) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """The tokens (B, T) that calls on a cache were fed while generating, with their start; and what came of it."""
    calls, fed = Calls(lm, real), list[tuple[int, Tensor]]()

    def note(arguments: Arguments) -> None:
        ids: Tensor = arguments[lm.convention.ids]
        if start := calls.start(arguments):
            fed.append((start, ids.clone()))

    with handed(lm, note):
        found = generate()
    return fed, found
