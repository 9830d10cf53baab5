"""Which tokens a position sees on a cache, and which in the whole sequence.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.symptoms import SAME, Patient, distinct_tokens, influence, symptom
from diymodel.verify.symptoms.decode import DECODE, beyond_the_window, cached_last, seen_by_whole

_LENGTH = 8


@symptom(
    "decode.ignores_the_prefix",
    "what was cached changes nothing: a cached step sees its own token only, from the first step on",
    "缓存的内容毫无作用：解码从第一步起就只看到它自己的 token",
    DECODE,
    ("cache-object-replaced",),
)
def _ignores_the_prefix(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if max(seen_by_whole(lm, ids)[:-1]) <= SAME:
        return None
    return max(influence(cached_last(lm, 5), ids)[:-1] + influence(cached_last(lm, 1), ids[:, :2])[:-1]) <= SAME


@symptom(
    "decode.forgets_the_oldest",
    "a cached step does not see the oldest of the tokens that it sees in the whole sequence",
    "用 cache 解码时，看不到整段计算时能看到的最早的 token",
    DECODE,
    ("cache-drops-oldest", "ring-cache-overwritten"),
)
def _forgets_the_oldest(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=_LENGTH)
    whole = [far > SAME for far in seen_by_whole(lm, ids)[:-1]]
    if not any(whole) or beyond_the_window(patient):
        return None

    def forgets(prefill: int) -> bool:
        cached = [far > SAME for far in influence(cached_last(lm, prefill, 1), ids)[:-1]]
        return any(cached) and cached.index(True) > whole.index(True)

    return any(forgets(prefill) for prefill in (1, 4, 7))


@symptom(
    "decode.sees_more",
    "a cached step sees tokens that the whole sequence does not",
    "用 cache 解码时看到了整段计算时看不到的 token",
    DECODE,
    ("window-ignored-in-decode",),
)
def _sees_more(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=_LENGTH)
    cached = influence(cached_last(lm, 7), ids)
    return any(seen > SAME >= hidden for seen, hidden in zip(cached, seen_by_whole(lm, ids), strict=True))


@symptom(
    "decode.chunk_sees_its_future",
    "within a chunk on a cache, the first position sees the last token",
    "一次送入多个 token 时，第一个位置看到了最后一个 token",
    ("decode.chunks", "causality.through_cache"),
    ("chunk-unmasked", "bidirectional-mask"),
)
def _chunk_sees_its_future(patient: Patient) -> bool | None:
    lm = patient.lm()
    return influence(_of_chunk(lm, 3, 0), distinct_tokens(lm))[-1] > SAME if _gives_each(lm) else None


@symptom(
    "decode.chunk_sees_next_token_only",
    "within a chunk on a cache, a position sees the token after it, and none further",
    "一次送入多个 token 时，每个位置只能看到它后面的那一个 token",
    ("decode.chunks", "causality.through_cache"),
    ("mask-sees-next-token",),
)
def _chunk_sees_next_token_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not _gives_each(lm):
        return None
    nearest, *beyond = influence(_of_chunk(lm, 2, 0), distinct_tokens(lm))[3:]
    return None if max(nearest, *beyond) <= SAME else max(beyond) <= SAME


def _of_chunk(lm: LM, prefill: int, position: int) -> Callable[[Tensor], Tensor]:
    """The logits of a position of the chunk after a prefill."""
    return lambda ids: lm.extend(ids[:, prefill:], lm.extend(ids[:, :prefill])[1])[0][:, position]


def _gives_each(lm: LM) -> bool:
    """Whether a chunk on a cache gives the logits of each of its positions: some give those of the last one only."""
    ids = distinct_tokens(lm)
    return lm.extend(ids[:, 3:], lm.extend(ids[:, :3])[1])[0].shape[1] == ids.shape[1] - 3


@symptom(
    "decode.chunk_blind_to_its_past",
    "within a chunk on a cache, a position does not see the token before it",
    "一次送入多个 token 时，后面的位置看不到前一个 token",
    ("decode.chunks",),
    ("chunk-mask-top-left",),
)
def _chunk_blind_to_its_past(patient: Patient) -> bool | None:
    lm = patient.lm()
    return influence(cached_last(lm, 3), distinct_tokens(lm))[-2] <= SAME


@symptom(
    "decode.chunk_loses_the_cached",
    "the first position of a chunk no longer sees what was cached, and the last one sees all that it should",
    "一次送入多个 token 时，第一个位置看不到缓存的内容，最后一个位置却该看到的都看到了",
    ("decode.chunks",),
    ("ring-cache-overwritten",),
)
def _chunk_loses_the_cached(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if beyond_the_window(patient) or not _gives_each(lm):
        return None

    def loses(position: int) -> bool:
        cached = influence(_of_chunk(lm, 3, position), ids)
        whole = influence(lambda tokens: lm.logits(tokens)[:, 3 + position], ids)
        return any(seen > SAME and not kept > SAME for seen, kept in zip(whole, cached, strict=True))

    return loses(0) and not loses(ids.shape[1] - 4)
