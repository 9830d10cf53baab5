"""Whether a module draws random numbers in training mode for something else than dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diymodel._compat import DispatchMode
from diymodel.verify.adapters import LM
from diymodel.verify.learning import training_undone
from diymodel.verify.randomness import seeded

_SEEDS = range(2, 26)  # a choice may well be the same in a few calls, but not in all these
_NO_SHARE = 1e-12  # of a dropout that never drops
_DRAWN = {"rand", "rand_like", "uniform", "uniform_"}
_COMPARED = {"lt", "le", "gt", "ge"}


class _Drops(DispatchMode):
    """Notes whether random numbers decide what is kept and what is not, in torch's dropout or by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False
        self.drawn: list[torch.UntypedStorage] = []  # kept, so that nothing else comes to lie there

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        given = {argument.name: value for argument, value in zip(function._schema.arguments, args, strict=False)}
        given |= kwargs or {}
        if name in _DRAWN:
            self.drawn.append(result.untyped_storage())
        elif name in _COMPARED:
            places = {drawn.data_ptr() for drawn in self.drawn}
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            self.seen |= any(tensor.untyped_storage().data_ptr() in places for tensor in tensors)
        elif name.startswith("bernoulli") or "dropout" in name or "dropout_p" in given:
            share = given.get("dropout_p", given.get("p", 0.5))
            self.seen |= isinstance(share, Tensor) or _NO_SHARE < share < 1 - _NO_SHARE
        return result


def draws_beside_dropout(lm: LM, run: Callable[[], Tensor]) -> bool:
    """Whether ``run()`` depends on random numbers in training mode alone, and drops nothing by them."""

    def varies() -> bool:
        def call(seed: int) -> Tensor:
            with seeded(seed), training_undone(lm.module):
                return run()

        first = call(1)
        return torch.equal(call(1), first) and any(not torch.equal(call(seed), first) for seed in _SEEDS)

    if varies():
        return False
    drops = _Drops()
    lm.module.train()
    try:
        noisy = varies()
        with training_undone(lm.module), drops:
            run()
    finally:
        lm.module.eval()
    return noisy and not drops.seen
