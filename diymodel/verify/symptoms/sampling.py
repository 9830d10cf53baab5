"""Which distribution the drawn tokens follow, where it is not that of the logits.

Shapes: B batch, T prompt length.
"""

from __future__ import annotations

import torch

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_FOLLOWS = "generation.follows_distribution"
_ROWS = 64
_SEEDS = 3


@symptom(
    "sampling.right_at_temperature_1",
    "at temperature 1 the drawn tokens follow the softmax of the logits",
    "温度为 1 时，抽到的 token 服从 logits 的 softmax",
    (_FOLLOWS,),
    ("temperature-misapplied",),
)
def _right_at_temperature_1(patient: Patient) -> bool | None:
    result = patient.failed[_FOLLOWS]
    if result.failure is None or result.failure.values.get("temperature", 1.0) == 1:
        return None if result.failure is None else False
    return patient.passes_now(result, temperature=1.0)


@symptom(
    "sampling.draws_but_at_temperature_1",
    "at temperature 1 nothing is drawn, at others it is",
    "温度为 1 时不抽样，其他温度下才抽",
    (_FOLLOWS, "generation.seed_repeats", "generation.rows_draw_independently"),
    ("temperature-misapplied",),
    settles=(_FOLLOWS, "generation.seed_repeats", "generation.rows_draw_independently"),
)
def _draws_but_at_temperature_1(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    if "temperature" not in lm.generating.names:
        return None
    rows = distinct_tokens(lm, length=2).repeat(_ROWS, 1)

    def draws(temperature: float) -> bool:
        found = {
            tuple(row) for seed in range(_SEEDS) for row in lm.sample(rows, 2, seed, temperature=temperature).tolist()
        }
        return len(found) > 1

    return draws(0.8) and draws(1.25) and not draws(1.0)


@symptom(
    "sampling.second_step_draws_as_the_first",
    "the second token is the one that a new call with the same seed draws first after the same text",
    "第二个 token，正是用同一个种子、在同样的文本后面重新生成时最先抽到的那个",
    (_FOLLOWS,),
    ("generator-reseeded",),
)
def _second_step_draws_as_the_first(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    rows = distinct_tokens(lm, length=2).repeat(_ROWS, 1)
    T = rows.shape[1]
    for seed in range(_SEEDS):
        both = lm.sample(rows, 2, seed)
        if not torch.equal(lm.sample(both[:, : T + 1], 1, seed)[:, T + 1], both[:, T + 1]):
            return False
    return True
