"""What dropout gives back is used."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diymodel.verify.failure import CheckFailure, NotApplicable, own_line
from diymodel.verify.learning import WIDE_ENOUGH
from diymodel.verify.randomness import seeded
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_DRAWS = 8
_DROPOUT = (F.dropout, torch.dropout, F.alpha_dropout, F.dropout1d)


class _OtherResult(TorchFunctionMode):
    """The results of one dropout, the ``which``-th to be called, are other numbers; ``lines`` gets where each stands.

    One that works in place gives back nothing that must be used, and is not counted.
    """

    def __init__(self, which: int | None, lines: list[str]) -> None:
        super().__init__()
        self.which, self.lines = which, lines

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in _DROPOUT or any(result is given for given in args) or not result.numel():
            return result
        self.lines.append(own_line() or "dropout")
        if self.which != len(self.lines) - 1:
            return result
        generator = torch.Generator().manual_seed(0)
        return result + torch.randn(result.shape, generator=generator).to(result)


@check(
    "modes.dropout_used",
    title="in training, what each dropout gives back has its part in the logits or the loss",
    step="3.3",
    causes=("dropout-never-active",),
)
@torch.no_grad()
def dropout_used(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, dropout=0.25, **WIDE_ENOUGH)
    ids = trial.tokens(lm, min_length=2)
    lm.module.train()
    has_loss = trial.missing("loss") is None

    def run(seed: int, which: int | None, lines: list[str]) -> Tensor:
        with seeded(seed), _OtherResult(which, lines):
            return lm.loss(ids, ids) if has_loss else lm.logits(ids)

    lines: list[str] = []
    unused: set[int] | None = None
    for seed in range(_DRAWS):  # what one draw drops, another does not
        plain = run(seed, None, lines := [])
        still = {which for which in range(len(lines)) if torch.equal(run(seed, which, []), plain)}
        unused = still if unused is None else unused & still
        if not unused:
            break
    if not lines:
        raise NotApplicable("forward calls no dropout of torch's")
    if unused:
        what = "loss" if has_loss else "logits"
        raise CheckFailure(
            f"what dropout gives back in {lines[min(unused)]} must have its part in the {what}, saw no difference "
            "whatever it is: the result is not used"
        )
