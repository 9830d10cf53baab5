"""What a module chooses among all the tokens of a call, so that one takes another's place.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.learning import gradients_to, trained_call
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, symptom

_ROWS = 4
_LATER = LENGTH // 2  # the first position that is changed, in the rows that are looked at


def _logits(lm: LM, ids: Tensor) -> Tensor:
    """Those of the beginnings of the first and the last row: whoever comes first, or last, may be favoured."""
    return trained_call(lm, ids.clone())[[0, -1], :_LATER]


def _depends_smoothly(lm: LM, ids: Tensor, others: Tensor) -> bool:
    """Whether they have a gradient to the embeddings of ``others`` (B, T)."""
    given: list[Tensor] = []

    def record(rows: Tensor) -> Tensor:
        given.append(rows.detach().requires_grad_())
        return given[-1].clone()  # which the module may write to

    with lm.embedding().giving(record), torch.enable_grad():
        found = gradients_to(_logits(lm, ids).square().sum(), given)
    return any(gradient is not None and bool(gradient[others].any()) for gradient in found)


@symptom(
    "experts.take_the_place_of_others",
    "a logit changes with other rows or later tokens and has no gradient to them: something is chosen among all tokens",
    "改动别的行或后面的 token 会改变 logit，对它们却没有梯度：有东西是在所有 token 之间挑选出来的",
    ("batch.*", "causality.*", "modes.agree_without_dropout"),
    ("expert-capacity-drops-tokens",),
)
def _take_the_place_of_others(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, _ROWS)
    others = torch.ones_like(ids, dtype=torch.bool)
    others[[0, -1], :_LATER] = False
    for training in (False, True):
        lm.module.train(training)
        plain = _logits(lm, ids)
        if apart(_logits(lm, ids), plain) > SAME:  # no two calls are the same
            return None
        for token in range(lm.config.vocab_size):  # all others are sent to one expert
            if apart(_logits(lm, ids.masked_fill(others, token)), plain) > SAME:
                return not _depends_smoothly(lm, ids, others)
    return False
