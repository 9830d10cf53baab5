"""What generate hands back.

Shapes: B batch, T query length.
"""

from __future__ import annotations

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_NEW = 3


@symptom(
    "generation.prompt_is_there",
    "the prompt stands where it should in what generate returns",
    "generate 的返回值里，提示词完好地在它该在的位置",
    ("generation.*",),
    ("generated-length-wrong",),
)
def _prompt_is_there(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=3)
    tokens = lm.greedy(ids, _NEW)
    return tokens.shape[1] >= 3 and bool(tokens[:, :3].equal(ids))


@symptom(
    "generation.length_is_wrong",
    "generate returns another number of tokens than was asked for",
    "generate 返回的 token 数与要求的不同",
    ("generation.*",),
    ("generated-length-wrong", "prompt-not-kept"),
)
def _length_is_wrong(patient: Patient) -> bool | None:
    lm = patient.lm()
    return lm.greedy(distinct_tokens(lm, length=3), _NEW).shape[1] != 3 + _NEW
