"""Where something leaks: in attention or elsewhere, in training, in gradients, between heads.

Shapes: T query length.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diymodel.verify.experiments.repairs import SoftmaxOverKeys
from diymodel.verify.experiments.watchers_of_places import MixedPlaces
from diymodel.verify.learning import trained_call
from diymodel.verify.randomness import reseed
from diymodel.verify.symptoms import SAME, Patient, apart, changed, distinct_tokens, influence, symptom
from diymodel.verify.symptoms.leaks import leaks_of
from diymodel.verify.symptoms.watched import looks_ahead, weights_of, weights_of_failures

_BY_VALUE = {"causality.edit", "causality.truncation"}
_LEAKS = ("causality.edit", "causality.truncation", "causality.gradient", "causality.in_training")
_APART = 11  # tokens: no width, and no number of heads, is near it or a multiple


def _leaks(patient: Patient) -> bool:
    """Whether in one layer, without dropout, the first position sees a later token, and always in the same way."""
    lm = patient.lm()
    ids = distinct_tokens(lm)

    def first(tokens: Tensor) -> Tensor:
        return lm.logits(tokens)[:, 0]

    return apart(first(ids), first(ids)) <= SAME < max(influence(first, ids)[1:])


@symptom(
    "leak.outside_attention",
    "attention is exactly causal where the future leaks: the leak is elsewhere",
    "泄漏发生时 attention 是严格因果的：泄漏出在别处",
    _LEAKS,
    ("statistic-over-sequence", "heads-mixed-by-reshape", "convolution-not-causal"),
)
def _outside_attention(patient: Patient) -> bool | None:
    failures = {id: patient.failed[id].failure for id in _LEAKS if id in patient.failed}
    numbers = [id for id, failure in failures.items() if failure is not None and failure.max_abs_diff is not None]
    if patient.passes_under(SoftmaxOverKeys, _LEAKS[:2]):
        return False
    seen = weights_of_failures(patient, numbers)
    if numbers != ["causality.gradient"] and not _leaks(patient):
        return None  # dropout, or what an earlier call left
    if not seen or any(bool(weights.isnan().any()) for weights in seen):
        return None
    return not looks_ahead(seen)


@symptom(
    "leak.in_attention",
    "where the future leaks, attention gives weight to keys behind their query",
    "泄漏发生时，attention 给 query 之后的 key 也分了权重",
    _LEAKS,
    (
        "bidirectional-mask",
        "mask-sees-next-token",
        "mask-dropped-on-fast-path",
        "mask-value-too-small",
        "mask-dropped-with-dropout",
    ),
)
def _in_attention(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not weights_of(lm, lambda: lm.logits(distinct_tokens(lm))):
        return None  # in small examples, what is no attention may have as many features as there are keys
    seen = weights_of_failures(patient, _LEAKS)
    if not seen or any(bool(weights.isnan().any()) for weights in seen):
        return None
    return looks_ahead(seen)


@symptom(
    "leak.of_first_position_only",
    "the first position sees later tokens, and no other does: it may see none, not even itself",
    "只有第一个位置看到了后面的 token：它一个都不许看，连自己也不行",
    ("causality.*",),
    ("mask-hides-self",),
)
def _of_first_position_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    first, *others = leaks_of(lm, distinct_tokens(lm))
    return max(first) > SAME >= max(leak for row in others for leak in row)


@symptom(
    "leak.in_gradients_only",
    "gradients see the future and values do not: something cancels out, and its gradient does not",
    "梯度看得到未来，数值看不到：有东西在数值上抵消了，梯度却没有",
    ("causality.gradient",),
    ("statistic-over-sequence",),
)
def _in_gradients_only(patient: Patient) -> bool | None:
    failure = patient.failed["causality.gradient"].failure
    if failure is None or failure.max_abs_diff is None:
        return None
    if patient.failed.keys() & _BY_VALUE:
        return False
    lm = patient.lm()
    return max(leak for row in leaks_of(lm, distinct_tokens(lm)) for leak in row) <= SAME


@symptom(
    "leak.in_training_only",
    "in training mode it leaks, and in eval mode it does not",
    "训练模式下泄漏，eval 模式下不泄漏",
    ("causality.in_training",),
    ("mask-dropped-with-dropout",),
)
def _in_training_only(patient: Patient) -> bool | None:
    lm = patient.lm(dropout=0.25)
    ids = distinct_tokens(lm)

    def first(tokens: Tensor) -> Tensor:
        reseed()  # the same dropout
        return trained_call(lm, tokens)[:, 0]

    in_eval = max(influence(first, ids)[1:])
    lm.module.train()
    return max(influence(first, ids)[1:]) > SAME >= in_eval


@symptom(
    "leak.none_with_one_head",
    "with one head nothing leaks, with two it does",
    "只有一个头时不泄漏，两个头时泄漏",
    ("causality.*",),
    ("heads-mixed-by-reshape",),
)
def _none_with_one_head(patient: Patient) -> bool | None:
    one = patient.lm(hidden_size=4, num_heads=1, num_kv_heads=1)
    two = patient.lm(hidden_size=8, num_heads=2, num_kv_heads=2)
    if (one.config.num_heads, two.config.num_heads) != (1, 2):
        return None
    in_one, in_two = (max(max(row) for row in leaks_of(lm, distinct_tokens(lm))) for lm in (one, two))
    return None if in_two <= SAME else in_one <= SAME


@symptom(
    "leak.by_a_view",
    "a view or reshape puts numbers of several positions into the vector of one",
    "某次 view 或 reshape 把几个位置的数拼进了同一个位置的向量",
    (*_LEAKS, "reference.*"),
    ("heads-mixed-by-reshape",),
    rules_out=(*_LEAKS, "causality.long_row", "causality.large_scores"),
    settles=(*_LEAKS, "causality.long_row", "causality.large_scores"),
)
def _by_a_view(patient: Patient) -> bool:
    lm = patient.lm()
    seen: list[bool] = []
    lm.around = partial(MixedPlaces, seen)
    lm.logits(distinct_tokens(lm, length=_APART))
    return any(seen)


@symptom(
    "packing.attention_keeps_apart",
    "documents in a row meet, and attention keeps them apart: they meet elsewhere",
    "同一行里的文档互相影响，attention 却把它们分开了：问题出在别处",
    ("packing.*", "causality.*", "loss.*", "modes.*", "sensitivity.*"),
    ("statistic-over-sequence",),
)
def _attention_keeps_apart(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    documents = (torch.arange(ids.shape[1], device=ids.device) // 3 + 1).expand_as(ids)

    def second(tokens: Tensor) -> Tensor:
        return lm.packed(tokens, documents)[:, 3:]

    seen = weights_of(lm, lambda: second(ids))
    if not seen:
        return None
    meet = apart(second(changed(ids, 1)), second(ids)) > SAME
    return meet and not any(bool(weights[..., 3:, :3].any()) for weights in seen)
