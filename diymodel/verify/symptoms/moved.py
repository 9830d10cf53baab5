"""Whether a failing cached step passes once its positions are moved.

What is moved may be no position: an exponent or an index is counted by ``arange`` as well, and to move it by one, the
length of the shortest prefix, may be right by chance. So a repair is believed only if it mends longer sequences too.
"""

from __future__ import annotations

from functools import partial

from diymodel.verify.experiments.repairs import PositionsAfterTheCache, PositionsOfTokensSeen, Repair, RepairOf
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom
from diymodel.verify.symptoms.decode import DECODE, wrong

_REPAIRED = ("decode.cached_equals_full",)
_NOWHERE = ("", -1)
_PLACES = 8  # at most, that are tried one by one


def _passes_somewhere(patient: Patient, repair: type[PositionsAfterTheCache]) -> bool | None:
    """Whether the failing trial passes once positions are repaired, at every place that counts some or at one."""
    if patient.passes_under(Repair, _REPAIRED) is not False:  # one that repairs nothing
        return None
    places: set[tuple[str, int]] = set()
    patient.passes_under(partial(repair, only=_NOWHERE, found=places), _REPAIRED)  # a wrong repair ends a trial early
    answer = _passes(patient, partial(repair, found=places))
    for place in sorted(places)[:_PLACES]:
        if answer is not False:
            break
        answer = _passes(patient, partial(repair, only=place))
    return answer


def _passes(patient: Patient, repair: RepairOf) -> bool | None:
    try:
        passes = patient.passes_under(repair, _REPAIRED)
        return passes and _mends_longer_ones(patient, repair)
    except Exception:  # what was moved is no position, and now an index beyond its end
        return False


def _mends_longer_ones(patient: Patient, repair: RepairOf) -> bool:
    """Whether steps after a longer prefix, if they are wrong, are right under a repair."""
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if not wrong(lm, ids):
        return True
    lm.around = repair
    return not wrong(lm, ids)


@symptom(
    "repair.positions_after_the_cache",
    "with the positions of the cached step moved by the cached length, the failing trial passes",
    "把解码那一步的位置加上已缓存的长度后，失败的例子就通过了",
    DECODE,
    ("position-restarts-in-decode",),
)
def _positions_after_the_cache(patient: Patient) -> bool | None:
    return _passes_somewhere(patient, PositionsAfterTheCache)


@symptom(
    "repair.positions_of_tokens_seen",
    "a cached step takes an earlier token's position; with the number of tokens seen instead, the failing trial passes",
    "解码那一步占用了前面某个 token 的位置；改成已看过的 token 数后，失败的例子就通过了",
    DECODE,
    ("position-from-kept-length", "position-restarts-in-decode", "state-survives-calls"),
)
def _positions_of_tokens_seen(patient: Patient) -> bool | None:
    return _passes_somewhere(patient, PositionsOfTokensSeen)
