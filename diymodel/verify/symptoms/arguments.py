"""What a call does to the tensors and the cache that it is given.

Shapes: B batch, T query length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_NEW = 2  # tokens to generate


@symptom(
    "inputs.written",
    "the token ids or labels are others after the call",
    "调用之后，传入的 token id 或标签变了",
    ("causality.*", "batch.*", "forward.*", "loss.*", "generation.*"),
    ("inputs-written-in-place",),
)
def _inputs_written(patient: Patient) -> bool | None:
    lm = patient.lm(pad_token_id=0)
    ids = distinct_tokens(lm, rows=2)
    ids[1, 2] = 0

    def written(call: Callable[[Tensor, Tensor], object]) -> bool:
        passed = ids.clone(), lm.own_labels(ids)
        before = [tensor.clone() for tensor in passed]
        call(*passed)
        return not all(map(torch.equal, passed, before))

    calls: list[Callable[[Tensor, Tensor], object]] = [lambda ids, labels: lm.logits(ids)]
    if patient.subject.missing("loss") is None and lm.convention.loss is None:
        calls.append(lm.own_loss)
    if patient.subject.missing("generate") is None:
        calls.append(lambda ids, labels: lm.generate(ids[:1] if lm.generating.one_row else ids, _NEW))
    return any(written(call) for call in calls)


def _tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, dict):
        for value in cache.values():
            yield from _tensors(value)
    elif isinstance(cache, (list, tuple)):
        for value in cache:
            yield from _tensors(value)
    elif hasattr(cache, "__dict__"):
        yield from _tensors(vars(cache))


class _Step(NamedTuple):
    """What continuing a cache did to it."""

    others: bool  # it holds other tensors
    in_a_list: bool  # as the entries of a list are others, not what they hold


def _after_a_step(patient: Patient) -> _Step | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if lm.convention.cache_on_module:
        return None
    _, past = lm.extend(ids[:, :4])
    held, entries = list(_tensors(past.cache)), _entries(past.cache)
    lm.extend(ids[:, 4:5], past)
    return _Step(not _same(list(_tensors(past.cache)), held), not _same(_entries(past.cache), entries))


def _entries(cache: Any) -> list[Any]:
    return list(cache) if isinstance(cache, list) else []


def _same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


@symptom(
    "cache.list_holds_others",
    "the list that was handed in holds other tensors after the step",
    "传进去的列表，在这一步之后装的是别的张量",
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
