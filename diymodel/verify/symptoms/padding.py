"""What padding does to the rows beside it and behind it: which call goes wrong, and what that call sees.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diymodel.verify.adapters import LM
from diymodel.verify.handing import Arguments, handed
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, changed, distinct_tokens, symptom

_PADDING = ("padding.*",)
_ROWS = 4


class _Batch(NamedTuple):
    """Rows of which the last token is fed on a cache of the others, and the padding stands among those."""

    ids: Tensor  # (B, T)
    real: Tensor  # (B, T)
    goes_on: bool  # each row's last token stands right behind its own, so a step is what the row gives alone

    @property
    def prefill(self) -> Tensor:
        return self.real[:, :-1]


def _batches(patient: Patient, lm: LM, equal: bool = False) -> Iterator[_Batch]:
    """Of each side on which the module takes padding, rows of unequal lengths or of one."""
    ids = distinct_tokens(lm, _ROWS, min(LENGTH, lm.config.max_seq_len))
    T = ids.shape[1] - 1
    shortest = max(1, lm.convention.shortest)
    lengths = [max(shortest, T - 2 if equal else T - row) for row in range(_ROWS)]
    right = torch.arange(T, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    missing = patient.subject.missing
    if missing("padding") is None:
        yield _Batch(ids, F.pad(right, (0, 1), value=True), missing("ragged_cache") is None)
    if missing("left_padding") is None:
        yield _Batch(ids, F.pad(right.flip(1), (0, 1), value=True), True)


def _steps(patient: Patient, lm: LM) -> bool:
    """Whether a step on a cache can be told of the padding in it."""
    convention = lm.convention
    told = convention.lengths or convention.left or (convention.mask and convention.mask_covers_cache)
    return bool(told) and patient.subject.missing("cache") is None


def _one_call(lm: LM, batch: _Batch, cached: bool = False) -> Tensor:
    """The logits of the prefill (B, T - 1, V)."""
    ids = batch.ids[:, :-1]
    return lm.extend(ids, None, batch.prefill)[0] if cached else lm.logits(ids, batch.prefill)


def _step(lm: LM, batch: _Batch) -> Tensor:
    """The logits of the last token on a cache of the others (B, V)."""
    _, past = lm.extend(batch.ids[:, :-1], None, batch.prefill)
    return lm.extend(batch.ids[:, -1:], past, batch.real)[0][:, -1]


def _call_off(lm: LM, batch: _Batch, cached: bool = False) -> bool:
    """Whether a real token of the prefill does not get what its row gives alone."""
    logits = _one_call(lm, batch, cached)
    rows = zip(batch.ids[:, :-1], batch.prefill, logits, strict=True)
    return any(not apart(seen[kept], lm.logits(row[kept][None])[0]) <= SAME for row, kept, seen in rows)


def _step_off(lm: LM, batch: _Batch) -> bool:
    """Whether the step does not give what each row gives alone."""
    rows = zip(batch.ids, batch.real, _step(lm, batch), strict=True)
    return any(not apart(seen, lm.logits(row[kept][None])[0, -1]) <= SAME for row, kept, seen in rows)


def _right_without(lm: LM, step: bool) -> bool:
    """Whether the same rows are right where nothing is padding: else it is not padding that goes wrong."""
    ids = distinct_tokens(lm, _ROWS, min(LENGTH, lm.config.max_seq_len))
    batch = _Batch(ids, torch.ones_like(ids, dtype=torch.bool), True)
    return not _call_off(lm, batch) and not (step and _step_off(lm, batch))


def _sees_padding(logits: Callable[[_Batch], Tensor], batch: _Batch) -> bool:
    """Whether other tokens at the padding change these logits."""
    other = batch.ids.where(batch.real, batch.ids.roll(1, 0))
    return not apart(logits(batch._replace(ids=other)), logits(batch)) <= SAME


def _wrong(patient: Patient, lm: LM, equal: bool = False) -> tuple[bool, bool] | None:
    """Whether a single call on padded rows, and a step after one, are wrong; None where no padding is needed for it."""
    step = _steps(patient, lm)
    if not _right_without(lm, step):
        return None
    batches = list(_batches(patient, lm, equal))
    steps = step and any(_step_off(lm, batch) for batch in batches if batch.goes_on)
    return any(_call_off(lm, batch) for batch in batches), steps


@symptom(
    "padding.only_the_step_wrong",
    "padded rows are right in one call, and wrong in a step on their cache",
    "带 padding 的行一次算完是对的，接着 cache 解码一步就错了",
    ("padding.*_with_cache",),
    (
        "padding-mask-lost-in-decode",
        "position-from-kept-length",
        "position-ids-ignored",
        "padded-batch-shared-position",
    ),
)
def _only_the_step_wrong(patient: Patient) -> bool | None:
    found = _wrong(patient, patient.lm())
    return None if found is None or not any(found) else found == (False, True)


@symptom(
    "padding.right_for_equal_lengths",
    "rows with the same amount of padding are right, rows with unequal amounts are not",
    "各行 padding 一样多时是对的，不一样多时出错",
    _PADDING,
    ("padded-batch-shared-position",),
)
def _right_for_equal_lengths(patient: Patient) -> bool | None:
    lm = patient.lm()
    unequal = _wrong(patient, lm)
    if unequal is None or not any(unequal):
        return None
    return _wrong(patient, lm, equal=True) == (False, False)


@symptom(
    "padding.step_without_its_mask",
    "a step on the cache sees what its mask hides: other tokens at the padding, or another mask, tell",
    "接着 cache 解码的一步看到了掩码遮住的内容：换掉 padding 处的 token 会影响结果，或者换个掩码却没有影响",
    ("padding.*_with_cache",),
    ("padding-mask-lost-in-decode",),
)
def _step_without_its_mask(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not _steps(patient, lm) or not _right_without(lm, step=True):
        return None
    batches = list(_batches(patient, lm))
    if any(_sees_padding(partial(_step, lm), batch) for batch in batches) or _mask_changes_nothing(lm):
        return True
    return False if any(batch.goes_on and _step_off(lm, batch) for batch in batches) else None


def _mask_changes_nothing(lm: LM) -> bool:
    """Whether hiding a token that is cached, from a step, makes no difference."""
    name, marks = lm.convention.mask, lm.convention.mask_marks_padding
    if name is None or lm.convention.lengths or lm.convention.left:
        return False
    ids = distinct_tokens(lm, _ROWS, min(LENGTH, lm.config.max_seq_len))
    batch = _Batch(ids, torch.ones_like(ids, dtype=torch.bool), True)

    def hide(arguments: Arguments) -> None:
        if arguments[lm.convention.ids].shape[1] == 1:
            arguments[name] = arguments[name].clone()
            arguments[name][:, 1] = marks

    plain = _step(lm, batch)
    with handed(lm, hide):
        return apart(_step(lm, batch), plain) <= SAME


def _real_logits(call: Callable[[_Batch], Tensor], batch: _Batch) -> Tensor:
    return call(batch)[batch.prefill]


@symptom(
    "padding.call_sees_padding",
    "in a single call the real tokens depend on what stands at the padding",
    "一次算完时，真实 token 的结果取决于 padding 位置上放了什么 token",
    _PADDING,
    ("mask-dropped-on-fast-path", "mask-hides-self", "bidirectional-mask"),
)
def _call_sees_padding(patient: Patient) -> bool | None:
    lm = patient.lm()
    wrong = _wrong(patient, lm)
    if wrong is None or not wrong[0]:
        return None
    logits = partial(_real_logits, partial(_one_call, lm))
    return any(_sees_padding(logits, batch) for batch in _batches(patient, lm))


@symptom(
    "padding.right_on_some_paths",
    "padded rows are right on some paths and not on others: with or without a cache, gradients or a fused kernel",
    "带 padding 的行有的路径算得对，有的不对：带不带 cache、开不开梯度、换 attention kernel，结果不同",
    _PADDING,
    ("mask-dropped-on-fast-path",),
)
def _right_on_some_paths(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not _right_without(lm, step=False):
        return None
    paths: list[tuple[Callable[[], AbstractContextManager[Any]], bool]] = [
        (torch.enable_grad, False),
        (torch.no_grad, False),
        (partial(sdpa_kernel, SDPBackend.MATH), False),
    ]
    if _steps(patient, lm):
        paths.append((torch.no_grad, True))
    mixed = wrong = False
    for batch in _batches(patient, lm):
        found = set()
        for path, cached in paths:
            with path():
                found.add(_call_off(lm, batch, cached))
        mixed, wrong = mixed or len(found) > 1, wrong or True in found
    return mixed if wrong else None


@symptom(
    "padding.first_token_sees_its_future",
    "behind padding the first real token sees the tokens after it, as where nothing is left that it may see",
    "左侧有 padding 时，第一个真实 token 看到了它后面的 token：掩码没给它留下任何可看的位置",
    _PADDING,
    ("mask-hides-self",),
)
def _first_token_sees_its_future(patient: Patient) -> bool | None:
    lm = patient.lm()
    if patient.subject.missing("left_padding") is not None or not _right_without(lm, step=False):
        return None
    ids = distinct_tokens(lm, 1, min(LENGTH, lm.config.max_seq_len))
    real = torch.arange(ids.shape[1], device=ids.device)[None] >= 2
    hidden, shown = (
        apart(lm.logits(changed(ids, -1), mask)[:, 2], lm.logits(ids, mask)[:, 2]) for mask in (real, None)
    )
    return None if shown > SAME else hidden > SAME
