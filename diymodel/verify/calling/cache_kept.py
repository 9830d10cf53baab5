"""Caches that the module keeps itself: how they are made, and what is kept between calls."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_makers import by_method, emptied, installing, makers_on, reset_on, set_up
from diymodel.verify.calling.installed import installers_on
from diymodel.verify.convention import Convention
from diymodel.verify.held import tensors_in, tensors_on
from diymodel.verify.learning import gradients_to, trainable


def cache_on_module(module: nn.Module, names: Mapping[str, Any]) -> dict[str, Any]:
    """The convention of a module that keeps its cache, if it has a method or a parameter that says so."""
    if names.get("start"):
        return {"cache_on_module": True, "always_cached": "use_cache" not in names}
    makers, reset = makers_on(module), reset_on(module)
    if makers and names.get("positions"):
        found = {"cache_on_module": True, "new_cache": set_up(makers[0], reset), "positions_are_shared": True}
        return found | {"always_cached": bool(names.get("block_mask"))}
    if reset is not None and names.get("use_cache"):
        return {"cache_on_module": True, "new_cache": by_method(reset)}
    if reset is not None and names.get("positions"):  # lit-llama, which makes its cache in the first call on it
        return {"cache_on_module": True, "new_cache": emptied(reset), "positions_are_shared": True}
    return {}


def always_cached_ways(module: nn.Module, convention: Convention) -> list[Convention]:
    """The ways to call a module that makes its caches by a method, where no call goes without one."""
    always = replace(convention, causal=None, always_cached=True)
    if convention.cache_on_module and convention.new_cache is None:
        return [replace(always, new_cache=installing(name, reset_on(module))) for name in installers_on(module)]
    if convention.always_cached or convention.new_cache is not None:
        return [] if convention.always_cached else [always]
    return [replace(always, new_cache=by_method(name)) for name in makers_on(module)] if convention.past else []


def forgets_tokens(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether a module that is told where its tokens start, or to use its cache, keeps nothing for a later call."""
    told = convention.start or (convention.use_cache and not convention.past)
    return bool(told and convention.cache_on_module) and not _keeps_tokens(module, config, convention, ids)


def _keeps_tokens(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether a call changes what the module holds, other than by making it, or by the same whatever the tokens are."""

    def after(tokens: Tensor) -> list[Tensor]:
        LM(module, config, convention).extend(tokens)
        return [tensor.clone() for tensor in tensors_on(module)]

    try:
        first, second = after(ids), after((ids + 1) % config.vocab_size)
    except Exception:  # a stranger's forward may raise anything; who tries it next tells what
        return True
    return len(first) != len(second) or any(not torch.equal(*pair) for pair in zip(first, second, strict=True))


def is_narrower(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether what is kept between calls has less precision than the module: rounding of that size is then no bug."""
    lm, ids = LM(module, config, convention), ids[:1] if convention.one_row else ids
    lm.logits(ids)  # what it makes in any first call, such as a table of positions, is no cache
    before = [(kept, kept.clone()) for kept in tensors_on(module)]
    _, past = lm.extend(ids[:, :1] if convention.one_at_a_time else ids)
    same = {id(kept) for kept, copy in before if torch.equal(kept, copy)}
    kept = [*tensors_in(past.cache), *(kept for kept in tensors_on(module) if id(kept) not in same)]
    return any(t.is_floating_point() and t.dtype.itemsize < convention.dtype.itemsize for t in kept)


def trains_on_cache(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether calls that are all on a cache carry gradients to be trained by.

    A cache that the module keeps must not hold the graph of one call in the way of the next, and gradients must reach
    in eval mode what they reach in training mode, where nothing may be cached. Who has to be asked for one first, as
    gpt-fast, is for inference.
    """
    kept = convention.cache_on_module
    if not convention.always_cached or (kept and convention.new_cache is not None):
        return False
    try:
        lm = LM(copy.deepcopy(module), config, replace(convention, trains_on_cache=True))  # it may keep a graph
        calls = [_reached(lm, ids)]
        if kept:
            calls.append(_reached(lm, ids))
            copy.deepcopy(lm.module)  # which what is kept with its graph prevents
            lm.module.train()
            calls.append(_reached(lm, ids))
    except Exception:  # a stranger's forward may raise anything; checks that go without gradients say what
        return False
    return bool(calls[0]) and all(reached == calls[0] for reached in calls)


@torch.enable_grad()
def _reached(lm: LM, ids: Tensor) -> set[str]:
    """The parameters that logits depend on."""
    leaves = trainable(lm)
    gradients = gradients_to(lm.logits(ids).sum(), list(leaves.values()))
    return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
