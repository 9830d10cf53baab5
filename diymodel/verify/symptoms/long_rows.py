"""What grows with the length of a row until its type cannot hold it.

Shapes: T query length.
"""

from __future__ import annotations

import torch

from diymodel.verify.adapters import LM
from diymodel.verify.held import tensors_in
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom
from diymodel.verify.trial import LONGEST

_FAILS = (
    "gradients.long_row_finite",
    "numerics.bfloat16_near_float64",
    "causality.long_row",
    "decode.long_row",
    "shape.longest",
    "loss.many_labels",
)
_SHORT = 16  # tokens; the longest row has twenty times as many
_EXPONENTIAL = 1e6  # times as much in the longest row: a sum over all tokens, even cubed, grows by 8,000


def _long(patient: Patient) -> LM | None:
    """A module that holds a long row; None where the subject holds none, or its short rows are no numbers already."""
    lm = patient.lm(sharpness=1, max_seq_len=LONGEST, vocab_size=LONGEST)
    if lm.config.max_seq_len < LONGEST or not bool(lm.logits(distinct_tokens(lm, length=_SHORT)).isfinite().all()):
        return None
    return lm


def _largest_output(lm: LM, length: int) -> float:
    """The largest number that any part hands on in a row of so many tokens."""
    largest = torch.zeros((), dtype=torch.float64)

    def note(part: object, inputs: object, output: object) -> None:
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and tensor.numel():
                torch.maximum(largest, tensor.detach().double().abs().nan_to_num(torch.inf).max().cpu(), out=largest)

    hooks = [part.register_forward_hook(note) for part in lm.module.modules()]
    try:
        with torch.no_grad():
            lm.logits(distinct_tokens(lm, length=length))
    finally:
        for hook in hooks:
            hook.remove()
    return float(largest)


def _outputs_grow(lm: LM) -> bool:
    return _largest_output(lm, LONGEST) > _EXPONENTIAL * _largest_output(lm, _SHORT)


@symptom(
    "long_row.outputs_grow",
    "what the parts hand on grows exponentially with the length of the row: from 16 tokens to 320 by more than a "
    "million times",
    "各部件的输出随序列长度指数增长：从 16 个 token 到 320 个，大了一百万倍以上",
    _FAILS,
    ("recurrence-grows",),
    settles=_FAILS,
)
def _grows(patient: Patient) -> bool | None:
    lm = _long(patient)
    return None if lm is None else _outputs_grow(lm)


@symptom(
    "long_row.logits_overflow",
    "in float32 the logits of a long row are not finite, though in float64 no part hands on anything large",
    "float32 下长序列的 logits 不是有限的数，而 float64 下各部件的输出都不大",
    _FAILS,
    ("decay-powers-overflow",),
    settles=(*_FAILS, "numerics.large_activations_finite"),
)
def _overflows(patient: Patient) -> bool | None:
    lm = _long(patient)
    if lm is None or _outputs_grow(lm):
        return None
    lm.cast(torch.float32)
    return not bool(lm.logits(distinct_tokens(lm, length=LONGEST)).isfinite().all())


@symptom(
    "long_row.only_gradients_overflow",
    "in float32 the logits of a long row are finite, and its gradients are not",
    "float32 下长序列的 logits 有限，梯度却不是有限的数",
    ("gradients.long_row_finite",),
    ("exp-before-mask", "masked-row-nan"),
)
def _only_gradients(patient: Patient) -> bool | None:
    overflows = _overflows(patient)
    return None if overflows is None else not overflows
