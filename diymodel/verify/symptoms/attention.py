"""What attention looks at, as its weights show.

Shapes: T query length, S key length.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diymodel.verify.experiments.watchers import NaNsGiven, SoftmaxesOverQueries
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom
from diymodel.verify.symptoms.watched import fail_again, later, weights_of, weights_of_failures

_FAINT = 4.0  # nats: what is hidden by a moderate number is fainter still, what is not hidden hardly is
_BEYOND_REACH = 1e6  # nats, as far as the largest scores that are tried
_UNEQUAL = 1e-6  # of weights
_FUTURE = "causality.edit"


@symptom(
    "attention.hides_self",
    "a query gives its own key no weight at all",
    "query 给自己的 key 的权重恰好是 0",
    ("reference.*", "causality.*", "padding.*", "sensitivity.*", "decode.*", "window.*"),
    ("mask-hides-self",),
)
def _hides_self(patient: Patient) -> bool | None:
    lm = patient.lm()
    seen = weights_of(lm, lambda: lm.logits(distinct_tokens(lm)))
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
    ids = [id for id in patient.failed if id.startswith(("shape.", "padding.")) or id in ("gradients.finite", _FUTURE)]
    lm = patient.lm()
    seen = weights_of_failures(patient, ids) or weights_of(lm, lambda: lm.logits(distinct_tokens(lm)))
    return any(bool(weights.isnan().any()) for weights in seen) if seen else None


@symptom(
    "attention.given_nan",
    "in a failing trial attention is given NaN: it comes from elsewhere",
    "失败的例子里，传给 attention 的已经是 NaN：它来自别处",
    ("shape.*",),
    ("statistic-over-sequence", "norm-of-zeros-nan"),
)
def _given_nan(patient: Patient) -> bool | None:
    seen: list[bool] = []
    fail_again(patient, [id for id in patient.failed if id.startswith("shape.")], partial(NaNsGiven, seen))
    return seen[0] if seen else None  # of the first, since a deeper one is given what others make


@symptom(
    "attention.future_is_faint",
    "later keys are hidden by a moderate number: far behind earlier ones, and not so far that no score catches up",
    "后面的 key 是用一个不够大的数屏蔽的：远远落后于前面的 key，但还不至于永远追不上",
    ("causality.*", "decode.*"),
    ("mask-value-too-small",),
    settles=(
        *("causality.edit", "causality.truncation", "causality.gradient", "causality.long_row"),
        "causality.large_scores",
    ),
)
def _future_is_faint(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    seen = weights_of(lm, lambda: lm.logits(distinct_tokens(lm)), log=True)
    if not seen:
        return None
    future = torch.cat([weights[..., later(weights)].flatten() for weights in seen])
    past = torch.cat([weights[..., ~later(weights)].flatten() for weights in seen])
    return _FAINT < float(past.mean() - future.mean()) < _BEYOND_REACH


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
    seen = weights_of(lm, lambda: lm.logits(torch.full_like(distinct_tokens(lm), 3)))
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
