"""What a step on a cache does with the padding that stands in it."""

from __future__ import annotations

from functools import partial

import torch

from diymodel.verify.adapters import LM
from diymodel.verify.experiments.handing import Arguments, handed
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, symptom
from diymodel.verify.symptoms.padding import (
    ROWS,
    Batch,
    padded_batches,
    right_without,
    sees_padding,
    step_logits,
    step_off,
    tells_steps,
    wrong_with_padding,
)


@symptom(
    "padding.only_the_step_wrong",
    "rows with the same amount of padding are right in one call, and wrong in a step on their cache",
    "padding 一样多的各行一次算完是对的，接着 cache 解码一步就错了",
    ("padding.*_with_cache",),
    (
        "padding-mask-lost-in-decode",
        "position-from-kept-length",
        "position-ids-ignored",
        "padded-batch-shared-position",
    ),
)
def _only_the_step_wrong(patient: Patient) -> bool | None:
    found = wrong_with_padding(patient, patient.lm(), equal=True)
    return None if found is None or not any(found) else found == (False, True)


@symptom(
    "padding.step_without_its_mask",
    "a step on the cache sees what its mask hides: other tokens at the padding, or another mask, tell",
    "接着 cache 解码的一步看到了掩码遮住的内容：换掉 padding 处的 token 会影响结果，或者换个掩码却没有影响",
    ("padding.*_with_cache",),
    ("padding-mask-lost-in-decode",),
)
def _step_without_its_mask(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not tells_steps(patient) or not right_without(lm, step=True):
        return None
    batches = list(padded_batches(patient, lm))
    if any(sees_padding(partial(step_logits, lm), batch) for batch in batches) or _mask_changes_nothing(lm):
        return True
    return False if any(batch.goes_on and step_off(lm, batch) for batch in batches) else None


def _mask_changes_nothing(lm: LM) -> bool:
    """Whether hiding a token that is cached, from a step, makes no difference."""
    name, marks = lm.convention.mask, lm.convention.mask_marks_padding
    if name is None or lm.convention.lengths or lm.convention.left:
        return False
    ids = distinct_tokens(lm, ROWS, min(LENGTH, lm.config.max_seq_len))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), True)

    def hide(arguments: Arguments) -> None:
        if arguments[lm.convention.ids].shape[1] == 1:
            arguments[name] = arguments[name].clone()
            arguments[name][:, 1] = marks

    plain = step_logits(lm, batch)
    with handed(lm, hide):
        return apart(step_logits(lm, batch), plain) <= SAME
