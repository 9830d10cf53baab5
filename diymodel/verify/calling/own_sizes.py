"""Sizes that a module has whatever its configuration says, as one that was written for one text.

Shapes: T query length, V vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.outputs import read_output
from diymodel.verify.calling.uncallable import LENGTH
from diymodel.verify.convention import Convention
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.failure import refusal
from diymodel.verify.trial import LONGEST

_MANY = 2**12  # tokens, more than a small vocabulary is ever rounded up to


def find_own_sizes(make: Callable[[DIYConfig], nn.Module], config: DIYConfig, convention: Convention) -> dict[str, Any]:
    """``vocab_size`` and ``max_seq_len`` of a module that has the same for a small configuration and for a large one.

    Args:
        make: builds a module.
        config: a small configuration, of which it does.
    """
    larger = replace(config, vocab_size=_MANY, max_seq_len=LONGEST)

    def answering(each: DIYConfig) -> LM:
        module = make(each)
        module.eval()
        draw_weights(module, seed=0, sharpness=2)  # its constructor may have left them undefined
        lm = LM(module, replace(config, vocab_size=1), convention)  # logits of any width
        lm.cast(convention.dtype)
        return lm

    try:
        small, large = answering(config), answering(larger)
    except Exception:  # what builds no second size has perhaps one, and does not say which
        return {}
    own: dict[str, Any] = {}
    with torch.no_grad():
        width = _width(small)
        if width is not None and width == _width(large):
            own["vocab_size"] = width
        if not (convention.last_only or convention.always_cached):
            length = _longest(small)
            if LENGTH <= length < LONGEST and length == _longest(large):
                own["max_seq_len"] = length
    return own


def _width(lm: LM) -> int | None:
    """V of the logits as they come; None where there are none."""
    seen: list[Any] = []
    hook = lm.module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    refusal(lm.logits, torch.zeros(1, lm.convention.shortest, dtype=torch.int64))
    hook.remove()
    logits = read_output(seen[0], vocab_size=0).logits if seen else None  # of no width that is preferred
    return None if logits is None else logits.shape[-1]


def _longest(lm: LM) -> int:
    """The most tokens, up to ``LONGEST``, that are taken."""

    def refuses(T: int) -> bool:
        return refusal(lm.logits, torch.zeros(1, T, dtype=torch.int64)) is not None

    if not refuses(LONGEST):
        return LONGEST
    return bisect.bisect_left(range(LONGEST), True, lo=lm.convention.shortest, key=refuses) - 1
