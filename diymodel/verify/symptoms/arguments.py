"""What a call does to the tensors that it is given.

Shapes: B batch, T query length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_NEW = 2  # tokens to generate


@symptom(
    "inputs.written",
    "the token ids or labels are others after the call",
    "调用之后，传入的 token id 或标签变了",
    ("causality.*", "batch.*", "forward.*", "loss.*", "generation.*"),
    ("inputs-written-in-place",),
)
def _inputs_written(patient: Patient) -> bool | None:
    lm = patient.lm(pad_token_id=0)
    ids = distinct_tokens(lm, rows=2)
    ids[1, 2] = 0

    def written(call: Callable[[Tensor, Tensor], object]) -> bool:
        passed = ids.clone(), lm.own_labels(ids)
        before = [tensor.clone() for tensor in passed]
        call(*passed)
        return not all(map(torch.equal, passed, before))

    calls: list[Callable[[Tensor, Tensor], object]] = [lambda ids, labels: lm.logits(ids)]
    if patient.subject.missing("loss") is None and lm.convention.loss is None:
        calls.append(lm.own_loss)
    if patient.subject.missing("generate") is None:
        calls.append(lambda ids, labels: lm.generate(ids[:1] if lm.generating.one_row else ids, _NEW))
    return any(written(call) for call in calls)
