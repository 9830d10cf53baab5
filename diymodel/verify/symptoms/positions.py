"""How a module tells where a token stands.

Shapes: T query length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diymodel.verify.experiments.handing import handed
from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, symptom

_FLOAT32 = 1e-4  # of the largest logit: as far as angles in float32 move them
_ROUNDED = 0.02  # of the largest logit: as far as angles in a half type move them


@symptom(
    "shift.nearly_right_by_one",
    "moving all positions by one changes little, as rounding in a half type does",
    "整体平移一个位置只引起很小的变化，像半精度的舍入",
    ("sensitivity.shift_invariance",),
    ("rope-low-precision",),
)
def _nearly_right_by_one(patient: Patient) -> bool | None:
    if patient.subject.missing("shifted") is not None:
        return None
    lm = patient.lm()
    ids = distinct_tokens(lm)
    return apart(patient.subject.moved(lm, ids, 1), lm.logits(ids)) < _ROUNDED


@symptom(
    "shift.right_for_heads_of_two",
    "with heads of two features, a pair in any convention, moving all positions by one changes nothing",
    "每个头只有两维（怎么配对都一样）时，整体平移一个位置不影响结果",
    ("sensitivity.shift_invariance",),
    ("rope-pairing-convention",),
    rules_out=("sensitivity.shift_invariance",),
)
def _right_for_heads_of_two(patient: Patient) -> bool | None:
    if patient.subject.missing("shifted") is not None:
        return None
    lm = patient.lm(hidden_size=8, num_heads=4, num_kv_heads=4)
    if lm.config.head_size != 2:
        return None
    ids = distinct_tokens(lm)
    return apart(patient.subject.moved(lm, ids, 1), lm.logits(ids)) <= _FLOAT32


@symptom(
    "positions.ignored",
    "it takes positions, and which ones it is handed changes nothing, at least beside a mask",
    "它接受位置参数，但传入什么位置都不影响结果，至少在同时传入 mask 时如此",
    ("padding.*", "generation.padded_prompt", "packing.*"),
    ("position-ids-ignored", "padded-batch-shared-position"),
)
def _ignored(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    name, T = lm.convention.positions, ids.shape[1]
    if name is None:
        return False
    usual = torch.arange(T, device=ids.device)

    def ignored(real: Tensor | None) -> bool:
        plain = lm.logits(ids, real)
        for other in (usual.flip(0), usual // 2):
            positions = other if lm.convention.positions_are_shared else other[None]
            with handed(lm, lambda arguments: arguments.update({name: positions})):  # noqa: B023
                if apart(lm.logits(ids, real), plain) > SAME:
                    return False
        return True

    if ignored(None):
        return True
    if patient.subject.missing("padding") is not None:
        return False
    real = torch.ones_like(ids, dtype=torch.bool)
    return apart(lm.logits(ids, real), lm.logits(ids)) <= SAME and ignored(real)
