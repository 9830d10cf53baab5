"""Under which restriction a module agrees with its reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.experiments.watchers import Choices
from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, symptom

_REFERENCE = ("reference.*",)


def _differs(patient: Patient, ids: Callable[[LM], Tensor] = distinct_tokens, **fixed: Any) -> bool | None:
    """Whether the logits are not those of the reference, over a configuration."""
    if patient.subject.reference is None:
        return None
    lm = patient.lm(**fixed)
    if any(getattr(lm.config, name) != value for name, value in fixed.items()):
        return None
    tokens = ids(lm)
    expected = patient.subject.reference(lm.config, lm.module.state_dict(), tokens)
    return apart(lm.logits(tokens).double(), expected) > SAME


def _right_when(patient: Patient, ids: Callable[[LM], Tensor] = distinct_tokens, **fixed: Any) -> bool | None:
    """Whether it is right under a restriction and wrong without it."""
    restricted = _differs(patient, ids, **fixed)
    if restricted is None or not _differs(patient, hidden_size=16, num_heads=4, num_kv_heads=2):
        return None
    return not restricted


@symptom(
    "reference.right_for_one_token",
    "one token alone is right: the bug is in how tokens attend to each other",
    "只有一个 token 时是对的：问题出在 token 之间的 attention",
    _REFERENCE,
    ("attention-scale-wrong", "rope-pairing-convention", "no-positions"),
)
def _right_for_one_token(patient: Patient) -> bool | None:
    return _right_when(patient, lambda lm: distinct_tokens(lm, length=1))


@symptom(
    "reference.right_for_equal_tokens",
    "with all tokens equal it is right: what differs is where attention looks, not what it finds",
    "所有 token 相同时是对的：错的是 attention 看向哪里，而不是看到什么",
    _REFERENCE,
    ("attention-scale-wrong", "rope-pairing-convention", "mask-hides-self", "no-positions"),
)
def _right_for_equal_tokens(patient: Patient) -> bool | None:
    return _right_when(patient, lambda lm: torch.full_like(distinct_tokens(lm), 3))


@symptom(
    "reference.right_without_groups",
    "with as many key heads as query heads it is right",
    "key 头数等于 query 头数时是对的",
    _REFERENCE,
    ("gqa-head-order",),
)
def _right_without_groups(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=16, num_heads=4, num_kv_heads=4)


@symptom(
    "reference.right_with_one_head",
    "with one head it is right",
    "只有一个头时是对的",
    _REFERENCE,
    ("heads-mixed-by-reshape", "gqa-head-order"),
)
def _right_with_one_head(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=4, num_heads=1, num_kv_heads=1)


@symptom(
    "reference.joins_heads_otherwise",
    "one token alone is right with one head and wrong with several: what the heads give is joined otherwise",
    "只有一个 token 时，一个头是对的，多个头就错：各头的输出拼接方式不同",
    _REFERENCE,
    ("heads-mixed-by-reshape",),
)
def _joins_heads_otherwise(patient: Patient) -> bool | None:
    def alone(lm: LM) -> Tensor:
        return distinct_tokens(lm, length=1)

    several = _differs(patient, alone, hidden_size=16, num_heads=4, num_kv_heads=4)
    one = _differs(patient, alone, hidden_size=4, num_heads=1, num_kv_heads=1)
    return None if several is None or one is None else several and not one


@symptom(
    "reference.right_for_heads_of_two",
    "with heads of size 2 it is right: larger ones are paired otherwise",
    "头的大小为 2 时是对的：更大时两两配对的方式不同",
    _REFERENCE,
    ("rope-pairing-convention",),
)
def _right_for_heads_of_two(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=8, num_heads=4, num_kv_heads=2)


@symptom(
    "reference.with_a_router",
    "it is a mixture of experts: the largest of some numbers are picked",
    "它是混合专家模型：会从一组数里挑出最大的几个",
    _REFERENCE,
    ("router-weights-not-normalised",),
)
def _with_a_router(patient: Patient) -> bool | None:
    lm = patient.lm()
    picked: list[bool] = []
    lm.around = partial(Choices, picked)
    lm.logits(distinct_tokens(lm))
    return bool(picked)
