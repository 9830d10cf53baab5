"""What generate hands back.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import torch

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_NEW = 3


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


@symptom(
    "generation.first_new_token_right",
    "after padding the first new token is right, and later ones are not",
    "有 padding 时第一个新 token 是对的，之后的才错",
    ("generation.padded_prompt",),
    ("padding-mask-lost-in-decode", "position-ids-ignored"),
)
def _first_new_token_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, rows=4)
    real = torch.arange(ids.shape[1], device=ids.device) < torch.tensor([3, 4, 5, 6], device=ids.device)[:, None]
    real = real.flip(1) if lm.generating.pads_left else real
    found = lm.generating.new_tokens(lm.greedy(ids, _NEW, real), real)
    firsts, all_right = True, True
    for row, new in enumerate(found):
        alone = ids[row : row + 1, real[row]]
        every = torch.ones_like(alone, dtype=torch.bool)
        expected = lm.generating.new_tokens(lm.greedy(alone, _NEW, every), every)[0]
        firsts &= bool(new[0] == expected[0])
        all_right &= bool(new.equal(expected))
    return None if all_right else firsts
