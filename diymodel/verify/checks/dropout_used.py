"""A dropout that is built is called, and what it gives back is used."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diymodel.verify.experiments.repairs import SDPA, attention_inputs
from diymodel.verify.failure import CheckFailure, NotApplicable, own_line
from diymodel.verify.learning import WIDE_ENOUGH
from diymodel.verify.randomness import seeded
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_DRAWS = 8
_DROPOUT = (F.dropout, torch.dropout, F.alpha_dropout, F.dropout1d)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # which nobody calls


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


class _Calls(TorchFunctionMode):
    """Notes which parts of a module are called, and which drop something by a function, torch's attention included."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.called: set[nn.Module] = set()
        self.drops: set[nn.Module] = set()
        self._inside: list[nn.Module] = []
        for part in module.modules():
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave)

    def _enter(self, part: nn.Module, inputs: Any) -> None:
        self.called.add(part)
        self._inside.append(part)

    def _leave(self, part: nn.Module, inputs: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drops = function in _DROPOUT or (function is SDPA and attention_inputs(args, kwargs).get("dropout_p"))
        if self._inside and drops:
            self.drops.add(self._inside[-1])
        return function(*args, **kwargs)

    def passed_over(self, module: nn.Module) -> str | None:
        """The first dropout that is not called, though the part that holds it is, and drops nothing by itself."""
        parts = dict(module.named_modules())
        for name, part in parts.items():
            holder = name
            while holder and (holder == name or isinstance(parts[holder], _CONTAINERS)):
                holder = holder.rpartition(".")[0]
            if not isinstance(part, nn.modules.dropout._DropoutNd) or not 0 < part.p < 1 or part in self.called:
                continue
            if parts[holder] in self.called - self.drops:
                return f"{name}, which drops {part.p:g}"
        return None


@check(
    "modes.dropout_used",
    title="in training each dropout is called, and what it gives back has its part in the logits or the loss",
    step="3.3",
    causes=("dropout-never-active",),
)
@torch.no_grad()
def dropout_used(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, dropout=0.25, **WIDE_ENOUGH)
    ids = trial.tokens(lm, min_length=2)
    lm.module.train()
    has_loss = trial.missing("loss") is None

    def run(seed: int, mode: TorchFunctionMode) -> Tensor:
        with seeded(seed), mode:
            return lm.loss(ids, ids) if has_loss else lm.logits(ids)

    lines: list[str] = []
    unused: set[int] | None = None
    for seed in range(_DRAWS):  # what one draw drops, another does not
        plain = run(seed, _OtherResult(None, lines := []))
        still = {which for which in range(len(lines)) if torch.equal(run(seed, _OtherResult(which, [])), plain)}
        unused = still if unused is None else unused & still
        if not unused:
            break
    calls = _Calls(lm.module)
    for seed in range(_DRAWS):  # an expert that is not chosen may be so by another draw
        run(seed, calls)
        if (passed_over := calls.passed_over(lm.module)) is None:
            break
    else:
        raise CheckFailure(f"in training {passed_over}, must be called, saw no call of it: it is built and never used")
    if not lines:
        raise NotApplicable("forward calls no dropout of torch's")
    if unused:
        what = "loss" if has_loss else "logits"
        raise CheckFailure(
            f"what dropout gives back in {lines[min(unused)]} must have its part in the {what}, saw no difference "
            "whatever it is: the result is not used"
        )
