"""Finds the method that sets up a cache on the module, by trying.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_makers import installing, reset_on
from diymodel.verify.calling.installed import installed_by, installers_on, state_of
from diymodel.verify.convention import Convention
from diymodel.verify.failure import refusal


def find_installed(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention | None:
    """The way to a cache that a method sets up, and that later calls go on with; None: there is none.

    Methods of such names make tables of positions as well, so what came before must reach the next token's logits.
    """
    plain = replace(convention, cache_on_module=False, always_cached=False)
    for method in installers_on(module):
        try:
            tried = copy.deepcopy(module)  # which the method may leave as it should not be
            expected = LM(tried, config, plain).logits(ids)
            before = state_of(tried)
        except Exception:  # a stranger's module may raise anything
            return None
        new_cache = installing(method, reset_on(module))
        if refusal(new_cache, tried, config, len(ids)) is not None:
            continue
        installed = None if convention.use_cache else installed_by(method, before)
        if installed is None and not convention.use_cache:
            continue
        way = replace(plain, cache_on_module=True, new_cache=new_cache, installed=installed)
        lm = LM(tried, config, way)
        if reads_cache(lm, ids) and torch.allclose(lm.logits(ids), expected):
            return way
    return None


def reads_cache(lm: LM, ids: Tensor) -> bool:
    """Whether the logits of a token on a cache depend on what is in it."""

    def next_logits(tokens: Tensor) -> Tensor:
        _, past = lm.extend(tokens)
        return lm.extend(ids[:, :1], past)[0]

    try:
        return not torch.equal(next_logits(ids), next_logits((ids + 1) % lm.config.vocab_size))
    except Exception:  # a stranger's forward may raise anything
        return False
