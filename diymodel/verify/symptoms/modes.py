"""What decides whether dropout drops in eval mode, and whether training mode differs by it alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diymodel.verify.adapters import LM, Around
from diymodel.verify.experiments.repairs import SDPA, NoDropout
from diymodel.verify.experiments.watchers_of_places import NOISE, Calls
from diymodel.verify.learning import trained_call
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom
from diymodel.verify.symptoms.saving import hidden_parameters
from diymodel.verify.symptoms.switches import DROPS, modes_of

_CALLS = 6  # dropout may drop the same elements twice, but not in all of them
_DROPOUT = 0.5
_DROPOUT_P = 4  # its place among the arguments of attention


def _varies(patients: LM, around: Around | None = None) -> bool:
    """Whether calls in the mode that it is in differ."""
    lm = LM(patients.module, patients.config, patients.convention)  # whose calls go on with the random numbers
    lm.around = around
    ids = distinct_tokens(lm)
    first = lm.logits(ids.clone())
    return bool(first.isfinite().all()) and any(not lm.logits(ids.clone()).equal(first) for _ in range(_CALLS))


def _drops_in_eval(patient: Patient) -> LM | None:
    """A module that drops after it was built and called in training, although every part is in eval mode now."""
    lm, without = patient.lm(dropout=_DROPOUT), patient.lm()
    lm.module.train()
    trained_call(lm, distinct_tokens(lm))
    lm.module.eval()
    if any(modes_of(lm.module).values()) or hidden_parameters(lm) or not _varies(lm):
        return None
    if _varies(without) and _varies(without, NoDropout):  # by something else than a dropout of its own
        return None
    return None if any(modes_of(lm.module).values()) else lm


@contextmanager
def _built_in_eval() -> Iterator[None]:
    """Modules begin in eval mode, not in training."""
    begin = nn.Module.__init__

    def begin_in_eval(self: nn.Module, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.training = False

    with mock.patch.object(nn.Module, "__init__", begin_in_eval):
        yield


def _decided_earlier(patient: Patient) -> bool:
    with _built_in_eval():
        lm = patient.lm(dropout=_DROPOUT)
    return not _varies(lm)


@symptom(
    "modes.decided_earlier",
    "in eval mode dropout goes on, unless the module was in eval mode when it was built and first called",
    "切到 eval 后 dropout 仍在生效；只有创建和第一次调用时就处于 eval，才不会",
    DROPS,
    ("mode-flag-copied",),
)
def _decided_when_it_was_built(patient: Patient) -> bool | None:
    return _drops_in_eval(patient) is not None and _decided_earlier(patient)


class _AttentionDrops(TorchFunctionMode):
    """Notes whether attention is called with a probability above 0."""

    seen = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is SDPA:
            probability = args[_DROPOUT_P] if len(args) > _DROPOUT_P else (kwargs or {}).get("dropout_p", 0.0)
            self.seen |= probability > 0
        return function(*args, **(kwargs or {}))


def _ways_to_drop(lm: LM) -> tuple[bool, bool]:
    """Whether dropout drops in a call without being told a mode, and because it is told one."""
    ids, dropout = distinct_tokens(lm), F.dropout
    told: set[bool] = set()

    def noting(x: Tensor, p: float = 0.5, *mode: bool, **named: Any) -> Tensor:
        if p and (mode[0] if mode else named.get("training", True)):
            told.add(bool(mode) or "training" in named)
        return dropout(x, p, *mode, **named)

    with mock.patch.object(F, "dropout", noting):
        lm.logits(ids)
    with _AttentionDrops() as attention:  # which knows no mode
        lm.logits(ids)
    return False in told or attention.seen, True in told


@symptom(
    "modes.dropout_is_told_none",
    "in eval mode dropout goes on because it is called without a mode",
    "切到 eval 后 dropout 仍在生效，因为调用它时没有告诉它处于哪种模式",
    DROPS,
    ("dropout-active-in-eval",),
)
def _dropout_is_told_none(patient: Patient) -> bool | None:
    lm = _drops_in_eval(patient)
    if lm is None or _decided_earlier(patient):
        return False
    without, told = _ways_to_drop(lm)
    return without if without or told else None


@symptom(
    "modes.dropout_is_told_to_train",
    "in eval mode dropout goes on because it is told that the module trains",
    "切到 eval 后 dropout 仍在生效，因为它被告知模块还在训练",
    DROPS,
    ("mode-flag-copied",),
)
def _dropout_is_told_to_train(patient: Patient) -> bool | None:
    lm = _drops_in_eval(patient)
    return lm is not None and _ways_to_drop(lm)[1]


@symptom(
    "modes.draws_noise",
    "in eval mode random numbers are drawn for a noise that is no dropout",
    "切到 eval 后仍在抽取随机噪声，而这不是 dropout",
    ("forward.deterministic",),
    ("dropout-active-in-eval",),
)
def _draws_noise(patient: Patient) -> bool | None:
    lm, calls = patient.lm(), Calls()
    lm.around = lambda start, length: calls
    lm.logits(distinct_tokens(lm))
    return bool(calls.names & NOISE)


@symptom(
    "modes.agree_once_nothing_drops",
    "with every dropout taken out, training mode gives the logits of eval mode: at 0 something still drops",
    "把所有 dropout 去掉后，训练模式的 logits 就与 eval 一致：概率为 0 时仍有东西被丢掉",
    ("modes.agree_without_dropout",),
    ("dropout-inverted",),
)
def _agree_once_nothing_drops(patient: Patient) -> bool | None:
    return patient.passes_under(NoDropout, ("modes.agree_without_dropout",))
