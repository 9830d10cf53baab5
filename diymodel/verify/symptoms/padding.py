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

from diymodel._compat import SDPBackend, sdpa_kernel
from diymodel.verify.adapters import LM
from diymodel.verify.experiments.handing import Arguments, handed
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, changed, distinct_tokens, symptom

_PADDING = ("padding.*",)
ROWS = 4


class Batch(NamedTuple):
    """Rows of which the last token is fed on a cache of the others, and the padding stands among those."""

    ids: Tensor  # (B, T)
    real: Tensor  # (B, T)
    goes_on: bool  # each row's last token stands right behind its own, so a step is what the row gives alone

    @property
    def prefill(self) -> Tensor:
        return self.real[:, :-1]


def padded_batches(patient: Patient, lm: LM, equal: bool = False) -> Iterator[Batch]:
    """Of each side on which the module takes padding, rows of unequal lengths or of one."""
    ids = distinct_tokens(lm, ROWS, min(LENGTH, lm.config.max_seq_len))
    T = ids.shape[1] - 1
    shortest = max(1, lm.convention.shortest)
    lengths = [max(shortest, T - 2 if equal else T - row) for row in range(ROWS)]
    right = torch.arange(T, device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    missing = patient.subject.missing
    if missing("padding") is None:
        yield Batch(
            ids, F.pad(right, (0, 1), value=True), all(missing(c) is None for c in ("ragged_cache", "padded_cache"))
        )
    if missing("left_padding") is None:
        yield Batch(ids, F.pad(right.flip(1), (0, 1), value=True), True)


def tells_steps(patient: Patient) -> bool:
    """Whether a step on a cache can be told of the padding in it."""
    return all(patient.subject.missing(capability) is None for capability in ("padding", "cache", "padded_cache"))


def _one_call(lm: LM, batch: Batch, cached: bool = False) -> Tensor:
    """The logits of the prefill (B, T - 1, V)."""
    ids = batch.ids[:, :-1]
    return lm.extend(ids, None, batch.prefill)[0] if cached else lm.logits(ids, batch.prefill)


def step_logits(lm: LM, batch: Batch) -> Tensor:
    """The logits of the last token on a cache of the others (B, V)."""
    _, past = lm.extend(batch.ids[:, :-1], None, batch.prefill)
    return lm.extend(batch.ids[:, -1:], past, batch.real)[0][:, -1]


def _call_off(lm: LM, batch: Batch, cached: bool = False) -> bool:
    """Whether a real token of the prefill does not get what its row gives alone."""
    logits = _one_call(lm, batch, cached)
    rows = zip(batch.ids[:, :-1], batch.prefill, logits, strict=True)
    return any(not apart(seen[kept], lm.logits(row[kept][None])[0]) <= SAME for row, kept, seen in rows)


def step_off(lm: LM, batch: Batch) -> bool:
    """Whether the step does not give what each row gives alone."""
    rows = zip(batch.ids, batch.real, step_logits(lm, batch), strict=True)
    return any(not apart(seen, lm.logits(row[kept][None])[0, -1]) <= SAME for row, kept, seen in rows)


def right_without(lm: LM, step: bool) -> bool:
    """Whether rows without padding are right, and blind to what comes after: else it is not padding that goes wrong."""
    ids = distinct_tokens(lm, ROWS, min(LENGTH, lm.config.max_seq_len))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), True)
    shortest = max(1, lm.convention.shortest)
    if _call_off(lm, batch) or apart(lm.logits(ids)[:, :shortest], lm.logits(ids[:, :shortest])) > SAME:
        return False
    return not (step and step_off(lm, batch))


def sees_padding(logits: Callable[[Batch], Tensor], batch: Batch) -> bool:
    """Whether other tokens at the padding change these logits."""
    other = batch.ids.where(batch.real, batch.ids.roll(1, 0))
    return not apart(logits(batch._replace(ids=other)), logits(batch)) <= SAME


def wrong_with_padding(patient: Patient, lm: LM, equal: bool = False) -> tuple[bool, bool] | None:
    """Whether a single call on padded rows, and a step after one, are wrong; None where no padding is needed for it."""
    step = tells_steps(patient)
    if not right_without(lm, step):
        return None
    batches = list(padded_batches(patient, lm, equal))
    steps = step and any(step_off(lm, batch) for batch in batches if batch.goes_on)
    return any(_call_off(lm, batch) for batch in batches), steps


@symptom(
    "padding.right_for_equal_lengths",
    "rows with the same amount of padding are right, rows with unequal amounts are not",
    "各行 padding 一样多时是对的，不一样多时出错",
    _PADDING,
    ("padded-batch-shared-position",),
)
def _right_for_equal_lengths(patient: Patient) -> bool | None:
    lm = patient.lm()
    unequal = wrong_with_padding(patient, lm)
    if unequal is None or not any(unequal):
        return None
    return wrong_with_padding(patient, lm, equal=True) == (False, False)


def _real_logits(call: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    return call(batch)[batch.prefill]


@symptom(
    "padding.call_sees_padding",
    "in a single call the real tokens depend on what stands at the padding",
    "一次算完时，真实 token 的结果取决于 padding 位置上放了什么 token",
    _PADDING,
    ("mask-dropped-on-fast-path", "mask-hides-self"),
)
def _call_sees_padding(patient: Patient) -> bool | None:
    lm = patient.lm()
    wrong = wrong_with_padding(patient, lm)
    if wrong is None or not wrong[0]:
        return None
    logits = partial(_real_logits, partial(_one_call, lm))
    return any(sees_padding(logits, batch) for batch in padded_batches(patient, lm))


@symptom(
    "padding.right_with_its_mask_turned",
    "with the mask turned round, 0 for 1 or end for beginning, padded rows are right",
    "把掩码反过来（0 与 1 互换，或首尾颠倒），带 padding 的行就对了",
    _PADDING,
    ("padding-mask-inverted",),
)
def _right_with_its_mask_turned(patient: Patient) -> bool | None:
    lm = patient.lm()
    name, batches = lm.convention.mask, list(padded_batches(patient, lm))
    if name is None or not any(_call_off(lm, batch) for batch in batches):
        return None

    def right(turn: Callable[[Tensor], Tensor]) -> bool:
        def change(arguments: Arguments) -> None:
            if arguments.get(name) is not None:
                arguments[name] = turn(arguments[name])

        with handed(lm, change):
            return not any(_call_off(lm, batch) for batch in batches)

    return right(lambda mask: (mask == 0).to(mask.dtype)) or right(lambda mask: mask.flip(-1))


@symptom(
    "padding.right_on_some_paths",
    "padded rows are right on some paths and not on others: with or without a cache, gradients or a fused kernel",
    "带 padding 的行有的路径算得对，有的不对：带不带 cache、开不开梯度、换 attention kernel，结果不同",
    _PADDING,
    ("mask-dropped-on-fast-path",),
)
def _right_on_some_paths(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not right_without(lm, step=False):
        return None
    paths: list[tuple[Callable[[], AbstractContextManager[Any]], bool]] = [
        (torch.enable_grad, False),
        (torch.no_grad, False),
        (partial(sdpa_kernel, SDPBackend.MATH), False),
    ]
    if tells_steps(patient):
        paths.append((torch.no_grad, True))
    mixed = wrong = False
    for batch in padded_batches(patient, lm):
        found = set()
        for path, cached in paths:
            with path():
                found.add(_call_off(lm, batch, cached))
        mixed, wrong = mixed or len(found) > 1, wrong or True in found
    return mixed if wrong else None


@symptom(
    "padding.mask_shows_the_future",
    "with a mask that hides nothing a token sees those after it, without a mask it does not",
    "传入一个什么都不遮的掩码，token 就看得到后面的 token；不传掩码则看不到",
    _PADDING,
    ("causal-dropped-with-mask",),
)
def _mask_shows_the_future(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, 1, min(LENGTH, lm.config.max_seq_len))
    with_mask, without = (
        apart(lm.logits(changed(ids, -1), mask)[:, :-1], lm.logits(ids, mask)[:, :-1])
        for mask in (torch.ones_like(ids, dtype=torch.bool), None)
    )
    return None if without > SAME else with_mask > SAME


@symptom(
    "padding.first_token_sees_its_future",
    "behind padding the first real token sees the tokens after it, as where nothing is left that it may see",
    "左侧有 padding 时，第一个真实 token 看到了它后面的 token：掩码没给它留下任何可看的位置",
    _PADDING,
    ("mask-hides-self",),
)
def _first_token_sees_its_future(patient: Patient) -> bool | None:
    lm = patient.lm()
    if patient.subject.missing("left_padding") is not None or not right_without(lm, step=False):
        return None
    ids = distinct_tokens(lm, 1, min(LENGTH, lm.config.max_seq_len))
    real = torch.arange(ids.shape[1], device=ids.device)[None] >= 2
    hidden, shown = (
        apart(lm.logits(changed(ids, -1), mask)[:, 2], lm.logits(ids, mask)[:, 2]) for mask in (real, None)
    )
    return None if shown > SAME else hidden > SAME
