"""What attention looks at, as its weights show.

Shapes: T query length, S key length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from diymodel.verify.adapters import LM, Around
from diymodel.verify.failure import CheckFailure
from diymodel.verify.randomness import seeded
from diymodel.verify.repairs import SoftmaxOverKeys
from diymodel.verify.symptoms import SAME, Patient, apart, changed, distinct_tokens, influence, symptom
from diymodel.verify.trial import Trial
from diymodel.verify.watchers import AttentionWeights, NaNsGiven, SoftmaxesOverQueries

_FAINT = 4.0  # nats: what is hidden by a moderate number is fainter still, what is not hidden hardly is
_LEAKS = ("causality.edit", "causality.truncation", "causality.gradient", "causality.in_training")
_UNEQUAL = 1e-6  # of weights


def _weights(lm: LM, call: Callable[[], object]) -> list[Tensor]:
    """Those (…, T, S) of each attention in a call."""
    seen: list[Tensor] = []
    lm.around = partial(AttentionWeights, seen)
    try:
        call()
    finally:
        lm.around = None
    return seen


def _weights_of_failures(patient: Patient, ids: Iterable[str]) -> list[Tensor]:
    """Those of every attention in the failing trials of these checks."""
    seen: list[Tensor] = []
    _fail_again(patient, ids, partial(AttentionWeights, seen))
    return seen


def _fail_again(patient: Patient, ids: Iterable[str], watcher: Around) -> None:
    """The failing trials of these checks, watched."""
    for id in ids:
        failure = patient.failed[id].failure if id in patient.failed else None
        if failure is None:
            continue
        trial = Trial.replaying(patient.subject, failure.values, patient.device)
        trial.around = watcher
        try:
            with seeded():
                patient.failed[id].check.function(trial)
        except CheckFailure:
            continue


def _later(weights: Tensor) -> Tensor:
    """Of keys behind their query (T, S)."""
    T, S = weights.shape[-2:]
    return torch.ones(T, S, dtype=torch.bool, device=weights.device).triu(S - T + 1)


@symptom(
    "attention.hides_self",
    "a query gives its own key no weight at all",
    "query 给自己的 key 的权重恰好是 0",
    ("reference.*", "causality.*", "padding.*", "sensitivity.*", "decode.*", "window.*"),
    ("mask-hides-self",),
)
def _hides_self(patient: Patient) -> bool | None:
    lm = patient.lm()
    seen = _weights(lm, lambda: lm.logits(distinct_tokens(lm)))
    if not seen or any(bool(weights.isnan().any()) for weights in seen):
        return None
    return all(not bool(weights.diagonal(dim1=-2, dim2=-1)[..., 1:].any()) for weights in seen)


@symptom(
    "attention.row_sees_nothing",
    "in a failing trial a query may see no key, and its weights are NaN",
    "失败的例子里有 query 一个 key 都看不到，权重成了 NaN",
    ("shape.*", "padding.*", "gradients.finite", "causality.edit"),
    ("masked-row-nan", "mask-hides-self"),
)
def _row_sees_nothing(patient: Patient) -> bool | None:
    ids = [
        id for id in patient.failed if id.startswith(("shape.", "padding.")) or id in ("gradients.finite", _LEAKS[0])
    ]
    lm = patient.lm()
    seen = _weights_of_failures(patient, ids) or _weights(lm, lambda: lm.logits(distinct_tokens(lm)))
    return any(bool(weights.isnan().any()) for weights in seen) if seen else None


def _leaks(patient: Patient) -> bool:
    """Whether in one layer, without dropout, the first position sees a later token, and always in the same way."""
    lm = patient.lm()
    ids = distinct_tokens(lm)

    def first(tokens: Tensor) -> Tensor:
        return lm.logits(tokens)[:, 0]

    return apart(first(ids), first(ids)) <= SAME < max(influence(first, ids)[1:])


@symptom(
    "attention.given_nan",
    "in a failing trial attention is given NaN: it comes from elsewhere",
    "失败的例子里，传给 attention 的已经是 NaN：它来自别处",
    ("shape.*",),
    ("statistic-over-sequence", "norm-of-zeros-nan"),
)
def _given_nan(patient: Patient) -> bool | None:
    seen: list[bool] = []
    _fail_again(patient, [id for id in patient.failed if id.startswith("shape.")], partial(NaNsGiven, seen))
    return seen[0] if seen else None  # of the first, since a deeper one is given what others make


@symptom(
    "leak.outside_attention",
    "attention is exactly causal where the future leaks: the leak is elsewhere",
    "泄漏发生时 attention 是严格因果的：泄漏出在别处",
    _LEAKS,
    ("statistic-over-sequence", "heads-mixed-by-reshape"),
)
def _outside_attention(patient: Patient) -> bool | None:
    failures = {id: patient.failed[id].failure for id in _LEAKS if id in patient.failed}
    numbers = [id for id, failure in failures.items() if failure is not None and failure.max_abs_diff is not None]
    if patient.passes_under(SoftmaxOverKeys, _LEAKS[:2]):
        return False
    seen = _weights_of_failures(patient, numbers)
    if numbers != ["causality.gradient"] and not _leaks(patient):
        return None  # dropout, or what an earlier call left
    if not seen or any(bool(weights.isnan().any()) for weights in seen):
        return None
    return not any(bool(weights[..., _later(weights)].any()) for weights in seen)


@symptom(
    "attention.future_is_faint",
    "later keys get some weight, a fiftieth of what earlier ones get: they are hidden by a moderate number",
    "后面的 key 仍有权重，约为前面的五十分之一：用来屏蔽的数不够大",
    ("causality.*", "decode.*"),
    ("mask-value-too-small",),
)
def _future_is_faint(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    seen = _weights(lm, lambda: lm.logits(distinct_tokens(lm)))
    if not seen:
        return None
    future = torch.cat([weights[..., _later(weights)].flatten() for weights in seen])
    past = torch.cat([weights[..., ~_later(weights)].flatten() for weights in seen])
    return bool((future > 0).all()) and float(past.log().mean() - future.log().mean()) > _FAINT


@symptom(
    "attention.adds_up_over_queries",
    "the weights of attention add up to 1 over the queries, not over the keys",
    "attention 的权重在 query 维上加起来是 1，而不是在 key 维上",
    ("causality.*", "decode.*", "reference.*"),
    ("softmax-wrong-axis",),
)
def _adds_up_over_queries(patient: Patient) -> bool | None:
    lm = patient.lm()
    seen: list[bool] = []
    lm.around = partial(SoftmaxesOverQueries, seen)
    lm.logits(distinct_tokens(lm))
    return any(seen) if seen else None


@symptom(
    "attention.place_is_nothing",
    "with all tokens equal, a query looks at all keys alike: it knows no places",
    "所有 token 相同时，query 对各个 key 一视同仁：它不知道位置",
    ("reference.*", "sensitivity.*"),
    ("no-positions",),
)
def _place_is_nothing(patient: Patient) -> bool | None:
    lm = patient.lm()
    seen = _weights(lm, lambda: lm.logits(torch.full_like(distinct_tokens(lm), 3)))
    if not seen or any(bool((weights[..., -1, :] == 0).any()) for weights in seen):
        return None  # a window, or a mask that is the matter
    return all(_even(weights) or _as_last_query(weights) for weights in seen)


def _even(weights: Tensor) -> bool:
    """Whether the last query looks at all keys alike, up to what a key says of itself by its place alone."""
    last = weights[..., -1, :]
    return float((last - last.mean(-1, keepdim=True)).abs().max()) < _UNEQUAL


def _as_last_query(weights: Tensor) -> bool:
    """Whether keys count against each other as for the query before, and not by distance (ALiBi) alone."""
    logs = weights.log()
    keys = logs[..., :-1] - logs[..., :1]
    same = float((keys[..., -1, :] - keys[..., -2, :]).abs().max()) < _UNEQUAL
    bends = keys[..., -1, 2:] - 2 * keys[..., -1, 1:-1] + keys[..., -1, :-2]
    return same and float(bends.abs().max()) > _UNEQUAL


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

    seen = _weights(lm, lambda: second(ids))
    if not seen:
        return None
    meet = apart(second(changed(ids, 1)), second(ids)) > SAME
    return meet and not any(bool(weights[..., 3:, :3].any()) for weights in seen)


@symptom(
    "padding.attended_without_cache",
    "without a cache padding gets some weight, and with one it gets none",
    "不用 cache 时 padding 得到了权重，用 cache 时没有",
    ("padding.*",),
    ("mask-dropped-on-fast-path",),
)
def _attended_without_cache(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    real = torch.arange(ids.shape[1], device=ids.device)[None] >= 2
    runs = (lambda: lm.logits(ids, real)), (lambda: lm.extend(ids, None, real))
    seen = [_weights(lm, run) for run in runs]
    if not all(seen):
        return None
    without, cached = (any(bool(weights[..., 2:, :2].any()) for weights in run) for run in seen)
    return without and not cached
