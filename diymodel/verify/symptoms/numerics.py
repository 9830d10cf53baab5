"""Where a half type runs out of range."""

from __future__ import annotations

from diymodel.verify.experiments.watchers import Overflows
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_LARGE = "numerics.large_activations_finite"


def _first_to_overflow(patient: Patient) -> str | None:
    """What leaves the range first in the failing trial; None where float64 is not finite either."""
    result, lm = patient.failed[_LARGE], patient.lm()
    if result.failure is None or not bool(lm.logits(distinct_tokens(lm)).isfinite().all()):
        return None
    with Overflows() as seen:
        patient.passes_now(result)
    first: str | None = seen.first
    return first


@symptom(
    "numerics.square_overflows",
    "what first leaves the range of the half type is a square, a norm or a mean",
    "最先超出半精度范围的是平方、范数或均值",
    (_LARGE,),
    ("rmsnorm-overflow-half", "statistic-over-batch", "statistic-over-sequence"),
    settles=(_LARGE,),
)
def _square_overflows(patient: Patient) -> bool | None:
    first = _first_to_overflow(patient)
    return None if first is None else first == "square"


@symptom(
    "numerics.scores_overflow",
    "what first leaves the range of the half type are the scores of attention or what is added to them",
    "最先超出半精度范围的是 attention 的 scores，或者加在上面的东西",
    (_LARGE,),
    ("softmax-overflow-half",),
    settles=(_LARGE,),
)
def _scores_overflow(patient: Patient) -> bool | None:
    first = _first_to_overflow(patient)
    return None if first is None else first == "scores"
