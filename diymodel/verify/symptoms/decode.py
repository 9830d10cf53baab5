"""When a cached step goes wrong, and when it is right.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.experiments.watchers import ZeroRows
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, influence, symptom, tells_order

DECODE = ("decode.*", "generation.cached_*", "directory.cached_*", "padding.*_with_cache")
_PREFILL = LENGTH - 3
_LONGER = 8
_DO_NOT_FIT = re.compile("must match the (existing )?size|non-singleton dimension")  # torch's words
_ROWS = 5  # as many as nothing else is
_COMPARED = ("decode.cached_equals_full", "decode.chunks")  # with the whole sequence


def cached_last(lm: LM, prefill: int = _PREFILL, step: int | None = None) -> Callable[[Tensor], Tensor]:
    """The logits of the last token, after a prefill; the rest is fed ``step`` tokens at a time (None: all at once)."""

    def run(ids: Tensor) -> Tensor:
        logits, past = lm.extend(ids[:, :prefill])
        for part in torch.split(ids[:, prefill:], step or ids.shape[1], 1):
            logits, past = lm.extend(part, past)
        return logits[:, -1]

    return run


def seen_by_whole(lm: LM, ids: Tensor) -> list[float]:
    """How far each token moves the last logits of the whole sequence."""
    return influence(lambda tokens: lm.logits(tokens)[:, -1], ids)


def beyond_the_window(patient: Patient) -> bool:
    """Whether one layer sees more of the whole sequence than the window declared: then the cache is not at fault."""
    if patient.subject.window is None:
        return False
    lm = patient.lm(num_layers=1)
    return sum(far > SAME for far in seen_by_whole(lm, distinct_tokens(lm))) > patient.subject.window


@torch.no_grad()
def wrong(lm: LM, ids: Tensor, prefill: int = _PREFILL) -> bool:
    """Whether any logits of single steps after a prefill are wrong; a NaN is wrong.

    Right is what the sequence up to there gives, without gradients as in the step: in a longer one a leak would be at
    fault, with gradients another path of attention.
    """
    expected = [lm.logits(ids[:, :end])[:, -1] for end in range(prefill, ids.shape[1] + 1)]
    logits, past = lm.extend(ids[:, :prefill].clone())
    seen = [logits[:, -1]]
    for t in range(prefill, ids.shape[1]):
        logits, past = lm.extend(ids[:, t : t + 1].clone(), past)
        seen.append(logits[:, -1])
    return not apart(torch.stack(seen), torch.stack(expected)) <= SAME


def right_once(patient: Patient, changed: Callable[[], bool], unchanged: Callable[[], bool]) -> bool | None:
    """Whether it is wrong no more with a change; None unless it is wrong without one, before and after alike."""
    if beyond_the_window(patient) or not unchanged():
        return None
    right = not changed()
    return right if unchanged() else None


@symptom(
    "decode.right_in_one_row",
    "one row alone is continued rightly, several are not",
    "只有一行时正确，多行时出错",
    DECODE,
    ("cache-rows-shared", "beam-reorder-skipped", "padded-batch-shared-position"),
)
def _right_in_one_row(patient: Patient) -> bool | None:
    lm = patient.lm()
    right = right_once(patient, lambda: wrong(lm, distinct_tokens(lm)), lambda: wrong(lm, distinct_tokens(lm, rows=3)))
    return right and not _failed_in_one_row(patient)


def _failed_in_one_row(patient: Patient) -> bool:
    """Whether a trial of one row alone went wrong."""
    failures = (patient.failed[id].failure for id in _COMPARED if id in patient.failed)
    return any(failure is not None and failure.values.get("rows") == 1 for failure in failures)


@symptom(
    "decode.step_sees_the_first_only",
    "a cached step sees itself and the first token, and none between them",
    "带 cache 的一步只看得到自己和第一个 token，中间的都看不到",
    DECODE,
    ("chunk-mask-top-left",),
)
def _step_sees_the_first_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if min(seen_by_whole(lm, ids)) <= SAME:
        return None
    first, *between, _ = influence(cached_last(lm, step=1), ids)
    return first > SAME and max(between) <= SAME


@symptom(
    "decode.right_in_one_layer",
    "one layer alone is right token by token, two are wrong from the second token on",
    "逐个 token 解码时，只有一层时正确，两层时从第二个 token 起就出错",
    DECODE,
    ("position-advances-per-layer", "bidirectional-mask"),
)
def _right_in_one_layer(patient: Patient) -> bool | None:
    one, two = patient.lm(num_layers=1), patient.lm(num_layers=2)
    if two.config.num_layers != 2:
        return None
    ids = distinct_tokens(two)
    right = right_once(patient, lambda: wrong(one, ids, 1), lambda: wrong(two, ids, 1))
    # What is right at first depends on more than a layer's place: on a window, on room for more.
    return right and wrong(two, ids[:, :2], 1)


@symptom(
    "decode.right_token_by_token",
    "fed one token at a time from the first on it is right, fed several at once it is not",
    "从头逐个 token 送入时正确，一次送入多个时出错",
    ("decode.*", "causality.through_cache"),
    ("ring-cache-overwritten", "chunk-unmasked", "chunk-mask-top-left", "chunk-size-changes-logits"),
)
def _right_token_by_token(patient: Patient) -> bool | None:
    lm = patient.lm(num_layers=2)
    ids = distinct_tokens(lm)

    @torch.no_grad()
    def several_at_once() -> bool:
        expected, past, same = lm.logits(ids), None, True
        for start, end in ((0, 3), (3, 5), (5, LENGTH)):
            logits, past = lm.extend(ids[:, start:end], past)
            same &= apart(logits, expected[:, start:end][:, -logits.shape[1] :]) <= SAME
        return not same

    return right_once(patient, lambda: wrong(lm, ids, 1), several_at_once)


@symptom(
    "decode.chunk_does_not_fit",
    "several tokens on a cache end in an error of sizes that do not fit, one at a time does not",
    "在 cache 上一次送入多个 token 会报张量大小不匹配的错误，逐个送入则不会",
    ("decode.*", "causality.through_cache"),
    ("chunk-mask-top-left",),
)
def _chunk_does_not_fit(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if lm.convention.one_at_a_time:
        return None
    lm.extend(ids[:, 3:4], lm.extend(ids[:, :3])[1])
    try:
        lm.extend(ids[:, 3:5], lm.extend(ids[:, :3])[1])
    except RuntimeError as error:
        return bool(_DO_NOT_FIT.search(str(error)))
    return False


@symptom(
    "decode.begins_with_zeros",
    "several tokens on a cache begin with zeros, where one goes on with what is cached",
    "在 cache 上一次送入多个 token 时从零开始，送入一个时却接着缓存的状态",
    ("decode.*",),
    ("carried-state-lost",),
)
def _begins_with_zeros(patient: Patient) -> bool | None:
    lm = patient.lm()
    if patient.subject.missing("chunks") is not None:
        return None
    ids = distinct_tokens(lm, rows=_ROWS)

    def zeros(T: int) -> int:
        _, past = lm.extend(ids[:, :_PREFILL])
        seen: list[Tensor] = []
        lm.around = partial(ZeroRows, seen, _ROWS)
        try:
            lm.extend(ids[:, _PREFILL : _PREFILL + T], past)
        finally:
            lm.around = None
        return len(seen)

    return zeros(2) > zeros(1)


@symptom(
    "decode.right_at_first",
    "the second token on a cache of one is right, and later ones are not",
    "缓存一个 token 之后的那一步是对的，再往后就错",
    DECODE,
    ("position-from-kept-length", "window-off-by-one", "ring-cache-overwritten", "cache-drops-oldest"),
)
def _right_at_first(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=_LONGER)
    return right_once(patient, lambda: wrong(lm, ids[:, :2], 1), lambda: wrong(lm, ids, 1))


@symptom(
    "decode.right_after_one_call",
    "a step is right after one call that cached all the others, and wrong after several that cached the same",
    "其余 token 一次缓存时，这一步是对的；分几次缓存同样的 token，就错了",
    DECODE,
    ("position-restarts-in-decode", "cached-keys-rotated-again", "state-survives-calls"),
)
def _right_after_one_call(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)

    def after_one_call() -> bool:
        return any(wrong(lm, ids[:, : prefill + 1], prefill) for prefill in range(1, LENGTH))

    return right_once(patient, after_one_call, lambda: wrong(lm, ids, 1))


@symptom(
    "decode.equal_tokens_right",
    "with all tokens equal it is right: what differs is where attention looks, not what it finds",
    "所有 token 相同时是对的：错的是 attention 看向哪里，而不是看到什么",
    DECODE,
    ("position-restarts-in-decode", "cached-keys-rotated-again", "rope-base-changes-mid-cache", "alibi-lost-in-decode"),
)
def _equal_tokens_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    return right_once(patient, lambda: wrong(lm, torch.full_like(ids, 3)), lambda: wrong(lm, ids))


@symptom(
    "decode.blind_to_order",
    "a cached step does not tell the order of what is cached, and the whole sequence does",
    "用 cache 解码时分不清缓存内容的先后，整段计算时却分得清",
    DECODE,
    ("alibi-lost-in-decode", "no-positions"),
)
def _blind_to_order(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if not tells_order(lambda tokens: lm.logits(tokens)[:, -1], ids):
        return None
    return not tells_order(cached_last(lm, LENGTH - 1), ids)
