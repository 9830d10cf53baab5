"""What generate hands to the calls of its own module, and what makes it keep to the likeliest tokens."""

from __future__ import annotations

from collections.abc import Callable

from diymodel.verify.experiments.handing import Arguments, Calls, fed_to_cache, handed, right_mask, right_positions
from diymodel.verify.symptoms import Patient, symptom
from diymodel.verify.symptoms.continuation import PADDED, drawn_prompts, parts_at, setting, write

_LIKELIEST = ("generation.cached_greedy_is_argmax", "generation.greedy_is_argmax")


def _right_when_handed(
    patient: Patient, change: Callable[[Calls, Arguments], None], argument: str, padded: bool
) -> bool | None:
    """Whether generate, which goes wrong, keeps to the likeliest tokens once its calls are handed something else.

    Args:
        argument: what is handed over, as the convention calls it.
        padded: asked where it takes padding to go wrong; else where it goes wrong without.
    """
    lm = patient.lm()
    if getattr(lm.convention, argument) is None or lm.convention.cache_on_module:
        return None
    if setting(patient, lm) is not padded:
        return None
    prompts = drawn_prompts(patient, lm, padded)
    calls = Calls(lm, prompts.real)
    with handed(lm, lambda arguments: change(calls, arguments)):
        found = write(lm, prompts, padded)
    return parts_at(lm, prompts, found) is None if calls.number else None


@symptom(
    "repair.positions_in_generate",
    "with the right positions handed to each call that generate makes, it takes the likeliest tokens",
    "给 generate 的每次调用传入正确的位置后，它选的就是概率最大的 token 了",
    _LIKELIEST,
    ("position-restarts-in-decode",),
)
def _positions_in_generate(patient: Patient) -> bool | None:
    return _right_when_handed(patient, right_positions, "positions", padded=False)


@symptom(
    "repair.positions_in_padded_generate",
    "with the right positions handed to each call that generate makes, it goes on rightly after padded prompts",
    "给 generate 的每次调用传入正确的位置后，带 padding 的提示词也接得对了",
    PADDED,
    ("padded-batch-shared-position",),
)
def _positions_in_padded_generate(patient: Patient) -> bool | None:
    return _right_when_handed(patient, right_positions, "positions", padded=True)


@symptom(
    "repair.mask_in_padded_generate",
    "with the right mask handed to each call that generate makes, it goes on rightly after padded prompts",
    "给 generate 的每次调用传入正确的掩码后，带 padding 的提示词也接得对了",
    PADDED,
    ("padding-mask-lost-in-decode",),
)
def _mask_in_padded_generate(patient: Patient) -> bool | None:
    return _right_when_handed(patient, right_mask, "mask", padded=True)


@symptom(
    "generation.hands_over_others",
    "generate feeds its cache other tokens than it wrote, or is right once it hands over the right mask",
    "接着 cache 生成时，generate 送进模型的不是它刚写下的 token，或者换上正确的掩码后就对了",
    ("generation.cached_greedy_is_argmax",),
    ("cached-path-diverges",),
)
def _hands_over_others(patient: Patient) -> bool | None:
    lm = patient.lm()
    if setting(patient, lm) is not False:
        return None
    prompts = drawn_prompts(patient, lm, padded=False)
    fed, found = fed_to_cache(lm, lambda: write(lm, prompts, padded=False), prompts.real)
    if any(not ids.equal(found[:, start : start + ids.shape[1]]) for start, ids in fed):
        return True
    return _right_when_handed(patient, right_mask, "mask", padded=False)
