"""Finds a method beside ``forward`` that makes the calls on a cache, by trying.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_makers import installing, reset_on
from diymodel.verify.calling.installed import installers_on
from diymodel.verify.calling.installing import reads_cache
from diymodel.verify.calling.signature import NAMES, told_parameters
from diymodel.verify.convention import CachedEntry, Convention

_STARTS = (*NAMES["start"], "cur_pos", "current_pos", "prev_pos", "cache_pos")


def find_entered(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention | None:
    """The way to a cache that one method sets up on the module, and that another goes on with; None: there is none.

    On all tokens at once, the other gives the last logits that ``forward`` gives.
    """
    if convention.sequence_first:
        return None
    for entry in _entries(module):
        for method in installers_on(module):
            tried = copy.deepcopy(module)  # which the method may leave as it should not be
            new_cache = installing(method, reset_on(module))
            plain = replace(convention, cache_on_module=False, always_cached=False)
            way = replace(plain, cache_on_module=True, new_cache=new_cache, cached_entry=entry)
            try:
                expected = LM(tried, config, plain).logits(ids)[:, -1]
                logits, _ = LM(tried, config, way).extend(ids)
            except Exception:  # a stranger's module may raise anything
                continue
            if torch.allclose(logits[:, -1], expected, rtol=1e-3) and reads_cache(LM(tried, config, way), ids):
                return way
    return None


def _entries(module: nn.Module) -> Iterator[CachedEntry]:
    """The methods of the module's own that take token ids and where they start, and need no more."""
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    methods = dict.fromkeys(name for kind in kinds for name, value in vars(kind).items() if callable(value))
    for name in methods:  # properties are not asked: one may warn
        if name.startswith("_") or name == "forward":
            continue
        try:
            known = dict(told_parameters(getattr(module, name)))
        except (TypeError, ValueError):  # nothing that can be looked into
            continue
        ids, start = (next((n for n in among if n in known), None) for among in (NAMES["ids"], _STARTS))
        if ids is None or start is None:
            continue
        others = (p for n, p in known.items() if n not in (ids, start))
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
            yield CachedEntry(name, ids, start)
