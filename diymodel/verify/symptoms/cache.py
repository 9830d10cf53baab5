"""What a cache holds, before a step and after it.

Shapes: T query length.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diymodel.verify.experiments.repairs import CachedKeysAsHeld
from diymodel.verify.held import tensors_in, tensors_of
from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, symptom
from diymodel.verify.symptoms.decode import right_once

_DTYPES = (torch.float32, torch.bfloat16)
_MOVED = 1e-3  # of a vector's length: what is further from where it was has been turned


class _Step(NamedTuple):
    """What continuing a cache did to it."""

    others: bool  # it holds other tensors
    in_a_list: bool  # it is a list, and that has other entries


def _after_a_step(patient: Patient) -> _Step | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if lm.convention.cache_on_module or patient.subject.missing("cache_value") is not None:
        return None  # an object may change under its holder's hands
    _, past = lm.extend(ids[:, :4])
    tensors, entries = tensors_in(past.cache), _entries(past.cache)
    lm.extend(ids[:, 4:5], past)
    return _Step(_others(tensors, tensors_in(past.cache)), _others(entries, _entries(past.cache)))


def _entries(cache: Any) -> list[Any]:
    return list(cache) if isinstance(cache, list) else []


def _others(before: list[Any], after: list[Any]) -> bool:
    return len(before) != len(after) or any(one is not other for one, other in zip(before, after, strict=True))


@symptom(
    "cache.list_holds_others",
    "the list that was handed in has other entries after the step",
    "传进去的列表，在这一步之后装的是别的东西",
    ("decode.*",),
    ("cache-list-mutated",),
)
def _list_holds_others(patient: Patient) -> bool | None:
    seen = _after_a_step(patient)
    return None if seen is None else seen.others and seen.in_a_list


@symptom(
    "cache.object_holds_others",
    "the object that was handed in holds other tensors after the step",
    "传进去的对象，在这一步之后装的是别的张量",
    ("decode.*",),
    ("cache-mutated-in-place",),
)
def _object_holds_others(patient: Patient) -> bool | None:
    seen = _after_a_step(patient)
    return None if seen is None else seen.others and not seen.in_a_list


@symptom(
    "cache.logits_of_another_dtype",
    "on a cache the logits have another dtype than without one",
    "用 cache 时，logits 的 dtype 与不用时不同",
    ("decode.*", "generation.cached_*"),
    ("cache-dtype-promoted",),
)
def _logits_of_another_dtype(patient: Patient) -> bool | None:
    lm = patient.lm()
    module, ids, answers = lm.module, distinct_tokens(lm), []
    for dtype in (lm.convention.dtype, *_DTYPES):
        lm.module = copy.deepcopy(module).to(dtype)
        try:
            whole = lm.logits(ids).dtype
            step, _ = lm.extend(ids[:, 4:5], lm.extend(ids[:, :4])[1])
        except Exception:  # not every module runs in every dtype
            continue
        answers.append(step.dtype != whole)
    return any(answers) if answers else None


@symptom(
    "cache.right_with_keys_as_held",
    "with cached keys put before the new ones as the cache held them, not turned, the step is right",
    "拼接时直接用 cache 里原样的 key，不再旋转，这一步就对了",
    ("decode.*",),
    ("cached-keys-rotated-again",),
)
def _right_with_keys_as_held(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)

    def wrong(repaired: bool) -> bool:
        lm.around = None
        logits, past = lm.extend(ids[:, :3])
        for t in range(3, ids.shape[1]):
            lm.around = partial(CachedKeysAsHeld, held=tensors_of(lm, past)) if repaired else None
            logits, past = lm.extend(ids[:, t : t + 1], past)
        lm.around = None
        return not apart(logits[:, -1], lm.logits(ids)[:, -1]) <= SAME

    return right_once(patient, lambda: wrong(True), lambda: wrong(False))


@symptom(
    "cache.held_keys_are_turned",
    "a step turns keys that stood in the cache already: they are others after it, and as long as before",
    "走一步之后，cache 里早已存好的 key 被转动了：向量变了，长度没变",
    ("decode.*",),
    ("cached-keys-rotated-again",),
)
def _held_keys_are_turned(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    _, past = lm.extend(ids[:, :3])
    for t in range(3, 5):
        before = [held.clone() for held in tensors_of(lm, past)]
        _, past = lm.extend(ids[:, t : t + 1], past)
        if _are_turned(before, tensors_of(lm, past)):
            return True
    return False


def _are_turned(before: list[Tensor], after: list[Tensor]) -> bool:
    """Whether some vectors of a cache point elsewhere after a step, and all are as long as they were.

    What is another token's has another length, the values' if not the keys'.
    """
    turned = False
    for old, new in zip(before, after, strict=True):
        if old.dim() < 3 or old.dim() != new.dim() or not old.is_floating_point():
            continue
        if old.dim() < 4 and old.shape == new.shape:
            continue  # of the last token alone, such as its embedding
        if any(later < size for size, later in zip(old.shape, new.shape, strict=True)):
            return False
        for dim, size in enumerate(old.shape):
            new = new.narrow(dim, 0, size)
        lengths = old.norm(dim=-1)
        there = lengths > 0
        if not torch.allclose(new.norm(dim=-1)[there], lengths[there]):
            return False
        turned = turned or bool(((new - old).norm(dim=-1)[there] > _MOVED * lengths[there]).any())
    return turned
