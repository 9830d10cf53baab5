"""Which tokens and rows a logit depends on.

Shapes: T query length.
"""

from __future__ import annotations

import torch

from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, influence, symptom


@symptom(
    "sensitivity.blind_to_own_token",
    "a position does not depend on its own token, though on the one before",
    "某个位置的输出与它自己的 token 无关，却与前一个有关",
    ("sensitivity.*", "reference.*"),
    ("mask-hides-self",),
)
def _blind_to_own_token(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    moved = influence(lambda tokens: lm.logits(tokens)[:, -1], ids)
    return moved[-1] <= SAME < moved[-2]


@symptom(
    "batch.other_rows_matter",
    "changing the tokens of one row changes the logits of another",
    "改动一行的 token，另一行的 logits 也变了",
    ("batch.*", "causality.*", "decode.*", "padding.*", "numerics.*"),
    ("statistic-over-batch", "statistic-over-sequence"),
)
def _other_rows_matter(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, rows=3)
    other = torch.cat((ids[:1], ids[1:].flip(1)))
    plain = lm.logits(ids)[:1]
    if apart(lm.logits(ids)[:1], plain) > SAME:  # no two calls are the same
        return None
    return apart(lm.logits(other)[:1], plain) > SAME


@symptom(
    "shape.nan_for_one_token",
    "one token alone gives NaN, several do not: something is divided by their number less one",
    "只有一个 token 时得到 NaN，多个时没有：有东西除以了 token 数减一",
    ("shape.*",),
    ("statistic-over-sequence",),
)
def _nan_for_one_token(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if bool(lm.logits(ids[:, :1]).isfinite().all()):
        return None
    return bool(lm.logits(ids).isfinite().all())
