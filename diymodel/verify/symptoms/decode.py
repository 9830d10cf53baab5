"""What a cached step sees, and where it goes wrong.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.repairs import PositionsAfterTheCache
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, influence, symptom

_DECODE = ("decode.*", "generation.cached_*", "directory.cached_*", "padding.*_with_cache")
_PREFILL = LENGTH - 1


def _cached_last(lm: LM, prefill: int = _PREFILL, step: int | None = None) -> Callable[[Tensor], Tensor]:
    """The logits of the last token, after a prefill; the rest is fed ``step`` tokens at a time (None: all at once)."""

    def run(ids: Tensor) -> Tensor:
        logits, past = lm.extend(ids[:, :prefill])
        for part in torch.split(ids[:, prefill:], step or ids.shape[1], 1):
            logits, past = lm.extend(part, past)
        return logits[:, -1]

    return run


def _wrong(lm: LM, ids: Tensor) -> bool:
    """Whether the logits of the last token are wrong on a cache of the others."""
    return apart(_cached_last(lm)(ids), lm.logits(ids)[:, -1]) > SAME


@symptom(
    "decode.ignores_the_prefix",
    "what was cached changes nothing: a cached step sees its own token only",
    "缓存的内容毫无作用：解码一步只看到它自己的 token",
    _DECODE,
    ("cache-object-replaced",),
)
def _ignores_the_prefix(patient: Patient) -> bool | None:
    lm = patient.lm()
    return max(influence(_cached_last(lm), distinct_tokens(lm))[:-1]) <= SAME


@symptom(
    "decode.forgets_the_oldest",
    "a cached step no longer sees the oldest tokens, and the whole sequence does",
    "用 cache 解码时看不到最早的 token，整段计算时却看得到",
    _DECODE,
    ("cache-drops-oldest", "ring-cache-overwritten", "position-from-kept-length"),
)
def _forgets_the_oldest(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=8)
    cached = influence(_cached_last(lm, 1, 1), ids)[:-1]
    whole = influence(lambda tokens: lm.logits(tokens)[:, -1], ids)[:-1]
    return cached[0] <= SAME < whole[0] and cached[-1] > SAME


@symptom(
    "decode.sees_more",
    "a cached step sees tokens that the whole sequence does not",
    "用 cache 解码时看到了整段计算时看不到的 token",
    _DECODE,
    ("window-ignored-in-decode",),
)
def _sees_more(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, length=8)
    cached = influence(_cached_last(lm, 7), ids)
    whole = influence(lambda tokens: lm.logits(tokens)[:, -1], ids)
    return any(seen > SAME >= hidden for seen, hidden in zip(cached, whole, strict=True))


@symptom(
    "decode.right_in_one_row",
    "one row alone is continued rightly, several are not",
    "只有一行时正确，多行时出错",
    _DECODE,
    ("cache-rows-shared", "beam-reorder-skipped", "padded-batch-shared-position"),
)
def _right_in_one_row(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not _wrong(lm, distinct_tokens(lm, rows=3)):
        return None
    return not _wrong(lm, distinct_tokens(lm))


@symptom(
    "decode.right_in_one_layer",
    "one layer alone is right, two are not",
    "只有一层时正确，两层时出错",
    _DECODE,
    ("position-advances-per-layer",),
)
def _right_in_one_layer(patient: Patient) -> bool | None:
    two = patient.lm(num_layers=2)
    if two.config.num_layers != 2 or not _wrong(two, distinct_tokens(two)):
        return None
    one = patient.lm()
    return not _wrong(one, distinct_tokens(one))


@symptom(
    "decode.equal_tokens_right",
    "with all tokens equal it is right: what differs is where attention looks, not what it finds",
    "所有 token 相同时是对的：错的是 attention 看向哪里，而不是看到什么",
    _DECODE,
    ("position-restarts-in-decode", "cached-keys-rotated-again", "rope-base-changes-mid-cache", "alibi-lost-in-decode"),
)
def _equal_tokens_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if not _wrong(lm, ids):
        return None
    return not _wrong(lm, torch.full_like(ids, 3))


@symptom(
    "decode.blind_to_order",
    "a cached step does not tell the order of what is cached, and the whole sequence does",
    "用 cache 解码时分不清缓存内容的先后，整段计算时却分得清",
    _DECODE,
    ("alibi-lost-in-decode", "no-positions"),
)
def _blind_to_order(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    exchanged = ids.clone()
    exchanged[:, 1:3] = ids[:, 1:3].flip(1)
    if apart(lm.logits(exchanged)[:, -1], lm.logits(ids)[:, -1]) <= SAME:
        return None
    cached = _cached_last(lm)
    return apart(cached(exchanged), cached(ids)) <= SAME


@symptom(
    "decode.chunk_sees_its_future",
    "within a chunk on a cache, a position sees the token after it",
    "一次送入多个 token 时，前面的位置看到了后面的 token",
    ("decode.chunks", "causality.through_cache"),
    ("chunk-unmasked", "bidirectional-mask"),
)
def _chunk_sees_its_future(patient: Patient) -> bool | None:
    lm = patient.lm()

    def first_of_chunk(ids: Tensor) -> Tensor:
        return lm.extend(ids[:, 3:], lm.extend(ids[:, :3])[1])[0][:, 0]

    return influence(first_of_chunk, distinct_tokens(lm))[-1] > SAME


@symptom(
    "decode.chunk_blind_to_its_past",
    "within a chunk on a cache, a position does not see the token before it",
    "一次送入多个 token 时，后面的位置看不到前一个 token",
    ("decode.chunks",),
    ("chunk-mask-top-left",),
)
def _chunk_blind_to_its_past(patient: Patient) -> bool | None:
    lm = patient.lm()
    return influence(_cached_last(lm, 3), distinct_tokens(lm))[-2] <= SAME


@symptom(
    "repair.positions_after_the_cache",
    "with the positions of the cached step moved by the cached length, the failing trial passes",
    "把解码那一步的位置加上已缓存的长度后，失败的例子就通过了",
    _DECODE,
    ("position-restarts-in-decode",),
)
def _positions_after_the_cache(patient: Patient) -> bool | None:
    return patient.passes_under(PositionsAfterTheCache, ("decode.cached_equals_full",))
