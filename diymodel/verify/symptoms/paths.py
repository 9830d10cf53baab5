"""How the paths through a module differ: with and without gradients, under each kernel; and its window.

Shapes: T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diymodel._compat import attention_backends, sdpa_kernel
from diymodel.verify.adapters import LM
from diymodel.verify.checks.compile import compiled
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, influence, symptom

_ROUNDED = 1e-5  # of the largest logit: kernels may round in float32
_SETTER = "set_attn_implementation"  # transformers' method


def _paths(lm: LM, ids: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """The logits of the last position (V), in each way that runs."""

    def last(way: Callable[[], AbstractContextManager[Any]], implementation: str | None, tokens: Tensor) -> Tensor:
        if implementation is not None:
            getattr(lm.module, _SETTER)(implementation)
        with way():
            return lm.logits(tokens)[0, -1]

    implementations = ("eager", "sdpa") if hasattr(lm.module, _SETTER) else (None,)
    kernels = [partial(sdpa_kernel, backend) for backend in attention_backends()]
    ways: list[Callable[[], AbstractContextManager[Any]]] = [torch.enable_grad, torch.no_grad, *kernels]
    for implementation in implementations:
        for way in ways:
            path = partial(last, way, implementation)
            try:
                path(ids)
            except Exception:  # a kernel that does not run here
                continue
            yield path


def _seen(path: Callable[[Tensor], Tensor], ids: Tensor) -> list[bool]:
    """Which tokens the last logits depend on."""
    return [moved > SAME for moved in influence(path, ids)]


@symptom(
    "paths.differ_on_the_same_tokens",
    "two paths give different logits, and both look at the same tokens",
    "两条路径的 logits 不同，看到的却是同样的 token",
    ("causality.*", "decode.*"),
    ("attention-backends-disagree",),
)
def _differ_on_the_same_tokens(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    first, *others = _paths(lm, ids)
    if apart(first(ids), first(ids)) > SAME:  # no two calls are the same
        return None
    different = [path for path in others if apart(path(ids), first(ids)) > _ROUNDED]
    if not different or not _sees_no_later(lm, ids):
        return False
    return all(_seen(path, ids) == _seen(first, ids) for path in different)


def _sees_no_later(lm: LM, ids: Tensor) -> bool:
    """Whether the first position sees itself only, with gradients and without."""
    for way in (torch.enable_grad, torch.no_grad):
        with way():
            if max(influence(lambda tokens: lm.logits(tokens)[:, 0], ids)[1:]) > SAME:
                return False
    return True


@symptom(
    "window.one_off",
    "on some path a position sees one token more, or one fewer, than the window holds",
    "在某条路径上，一个位置看到的 token 比窗口多一个或少一个",
    ("window.*", "causality.*", "decode.*", "reference.*", "sensitivity.*"),
    ("window-off-by-one",),
)
def _one_off(patient: Patient) -> bool | None:
    window, lm = patient.subject.window, patient.lm(num_layers=1)  # in more, it sees further
    ids = distinct_tokens(lm, length=(window or LENGTH) + 3)
    if window is None:  # or nobody says how wide it is
        return False if all(_seen(lambda tokens: lm.logits(tokens)[0, -1], ids)) else None
    return any(abs(sum(_seen(path, ids)) - window) == 1 for path in _paths(lm, ids))


def _cached_last(lm: LM, ids: Tensor) -> Tensor:
    """The logits of the last token (V), on a cache of the others, fed one by one."""
    _, past = lm.extend(ids[:, :1])
    for token in torch.split(ids[:, 1:], 1, 1):
        logits, past = lm.extend(token, past)
    return logits[0, -1]


@symptom(
    "paths.cached_equals_without_gradients",
    "a cached step is that of the whole sequence without gradients, and not of that with them: the cache is right",
    "用 cache 的一步与不带梯度的整段计算一致，与带梯度的不一致：cache 本身没有问题",
    ("causality.*", "decode.*"),
    ("attention-backends-disagree", "mask-dropped-on-fast-path"),
)
def _cached_equals_without_gradients(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    cached = _cached_last(lm, ids)
    recorded = lm.logits(ids)[0, -1]
    with torch.no_grad():
        plain = lm.logits(ids)[0, -1]
    return apart(cached, plain) <= SAME and apart(recorded, plain) > _ROUNDED


@symptom(
    "window.cached_step_is_right",
    "a cached step sees as many tokens as the window holds, and the whole sequence another number",
    "用 cache 的一步看到的 token 数与窗口相符，整段计算看到的却不符",
    ("window.*", "causality.*", "decode.*"),
    ("window-off-by-one",),
)
def _cached_step_is_right(patient: Patient) -> bool | None:
    window, lm = patient.subject.window, patient.lm(num_layers=1)  # in more, it sees further
    ids = distinct_tokens(lm, length=(window or LENGTH) + 3)
    whole = sum(_seen(lambda tokens: lm.logits(tokens)[0, -1], ids))
    if window is None:
        return False if whole == ids.shape[1] else None
    return sum(_seen(partial(_cached_last, lm), ids)) == window != whole


@symptom(
    "compile.leaks",
    "compiled, a position sees later tokens, and as it is it does not",
    "编译后某个位置看到了后面的 token，不编译时看不到",
    ("compile.*",),
    ("mask-dropped-on-fast-path",),
)
def _compiled_leaks(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    with compiled(lm, "eager") as other:
        leaks = [
            max(influence(lambda tokens, path=path: path.logits(tokens)[:, 0], ids)[1:])  # type: ignore[misc]
            for path in (lm, other)
        ]
    return leaks[0] <= SAME < leaks[1]
