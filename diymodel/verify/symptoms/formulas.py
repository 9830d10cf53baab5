"""Which change to a formula makes a module agree with its reference.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.experiments.repairs import RepairOf
from diymodel.verify.experiments.repairs_layers import (
    ACTIVATIONS,
    ROUTINGS,
    GateAndUpExchanged,
    OtherActivation,
    OtherRouting,
    ScaledScores,
)
from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, symptom

_REFERENCE = ("reference.*",)
_WIDEST = math.log(32.0)  # factors of scores that are tried: from 1/32 to 32
_STEPS = 48
_GOLDEN = (math.sqrt(5) - 1) / 2
_FOUND = 1e-7  # a factor is found to that much
_SIZES = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 12}  # no two sizes coincide


class _Case(NamedTuple):
    """A module that differs from its reference."""

    lm: LM
    ids: Tensor
    expected: Tensor  # (B, T, V)

    def off(self, repair: RepairOf | None) -> float:
        """How far it is from the reference under a repair."""
        self.lm.around = repair
        try:
            return apart(self.lm.logits(self.ids).double(), self.expected)
        finally:
            self.lm.around = None


def _case(patient: Patient) -> _Case | None:
    reference = patient.subject.reference
    if reference is None:
        return None
    lm = patient.lm(**_SIZES)
    ids = distinct_tokens(lm)
    case = _Case(lm, ids, reference(lm.config, lm.module.state_dict(), ids))
    return case if case.off(None) > SAME else None


def _one_of(case: _Case, repairs: list[RepairOf]) -> bool | None:
    """Whether one of them makes it right; None where none of them changes anything."""
    before = case.lm.logits(case.ids)
    off = []
    for repair in repairs:
        case.lm.around = repair
        try:
            logits = case.lm.logits(case.ids)
        except Exception:  # a module may not bear it
            continue
        finally:
            case.lm.around = None
        if not logits.equal(before):
            off.append(apart(logits.double(), case.expected))
    return min(off) <= SAME if off else None


@symptom(
    "repair.scaled_scores",
    "with all scores of attention times one factor, the logits are those of the reference",
    "把 attention 的所有 scores 乘上同一个系数后，logits 就与参考实现一致",
    _REFERENCE,
    ("attention-scale-wrong",),
)
def _scaled_scores(patient: Patient) -> bool | None:
    case = _case(patient)
    if case is None or case.off(partial(ScaledScores, 2.0)) == case.off(None):
        return None
    return _smallest(lambda factor: case.off(partial(ScaledScores, factor))) <= _FOUND


def _smallest(off: Callable[[float], float]) -> float:
    """Of a function of a factor, near the best of some factors, by golden section."""
    grid = [_WIDEST * step / 12 for step in range(-12, 13)]
    best = min(grid, key=lambda log: off(math.exp(log)))
    low, high = best - _WIDEST / 12, best + _WIDEST / 12
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if off(math.exp(left)) < off(math.exp(right)):
            high = right
        else:
            low = left
    return off(math.exp((low + high) / 2))


@symptom(
    "repair.other_activation",
    "with another activation, or with the other branch of the MLP activated, the logits are those of the reference",
    "换一个激活函数，或改为激活 MLP 的另一支，logits 就与参考实现一致",
    _REFERENCE,
    ("activation-wrong",),
)
def _other_activation(patient: Patient) -> bool | None:
    case = _case(patient)
    if case is None:
        return None
    pairs = [(old, new) for old in ACTIVATIONS for new in ACTIVATIONS if old != new]
    return _one_of(case, [GateAndUpExchanged, *(partial(OtherActivation, old, new) for old, new in pairs)])


@symptom(
    "repair.other_routing",
    "with the experts weighed by another rule, the logits are those of the reference",
    "换一种给专家加权的规则后，logits 就与参考实现一致",
    _REFERENCE,
    ("router-weights-not-normalised",),
)
def _other_routing(patient: Patient) -> bool | None:
    case = _case(patient)
    if case is None:
        return None
    return _one_of(case, [partial(OtherRouting, of_all, of_chosen) for of_all, of_chosen in ROUTINGS])
