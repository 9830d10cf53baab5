"""The arguments of a call, as a subject's convention names and shapes them.

Shapes: B batch, T query length, S key length (cached + T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diymodel.verify.calling.masks import causal_block_mask
from diymodel.verify.convention import Convention


def of_tokens(
    convention: Convention, module: nn.Module, input_ids: Tensor, real: Tensor | None, start: int
) -> dict[str, Any]:
    """Those of a call on tokens (B, T) after ``start`` others, without those for a cache.

    ``real`` (B, S) is False at padding; None: there is none.
    """
    B, T = input_ids.shape
    inputs: dict[str, Any] = {convention.ids: input_ids, **convention.extra}
    if convention.start and not convention.placed_on_cache:
        inputs[convention.start] = start
    if convention.causal:
        inputs[convention.causal] = convention.causal_mask.make(T, start, next(module.parameters()))
    if convention.block_mask:
        inputs[convention.block_mask] = causal_block_mask(module, T)
    if convention.positions_always:
        inputs[some(convention.positions)] = _positions(convention, input_ids, start)
    if real is None and convention.mask_always:
        real = torch.ones(B, start + T, dtype=torch.bool, device=input_ids.device)
    if real is None:
        return inputs
    if convention.lengths:
        return inputs | {convention.lengths: real[:, -T:].sum(1)}
    if convention.left and not convention.mask_always and (bool(real.all()) or not bool(real[:, 0].all())):
        return inputs | {convention.left: (~real).long().cumprod(1).sum(1)}
    covered = real if convention.mask_covers_cache else real[:, -T:]
    marked = ~covered if convention.mask_marks_padding else covered
    inputs[some(convention.mask)] = marked.to(convention.mask_dtype)
    if convention.positions and not convention.positions_are_shared:
        inputs[convention.positions] = (real.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
    return inputs


def on_a_cache(
    convention: Convention,
    module: nn.Module,
    input_ids: Tensor,
    cache: Any,
    start: int,
    tokens: Tensor | None,
    real: Tensor | None,
) -> dict[str, Any]:
    """Those of a call on tokens (B, T) and a cache of ``start`` others.

    Args:
        cache: None: there is none yet, or it is on the module.
        tokens: (B, S) cached and new, for a module that gets all of them again.
        real: (B, S), False at padding; None: there is none.
    """
    if tokens is not None:
        inputs = of_tokens(convention, module, tokens, real, 0)
    elif convention.cached_entry:
        inputs = convention.cached_entry.arguments(input_ids, start)
    else:
        inputs = of_tokens(convention, module, input_ids, real, start)
    inputs |= convention.cached_extra
    if cache is not None or (convention.always_cached and convention.past and not convention.cache_on_module):
        inputs |= _holding(convention, cache)
    if convention.use_cache:
        inputs[convention.use_cache] = True
    if convention.new_tokens:
        inputs[convention.new_tokens] = input_ids.shape[1]
    if convention.start and convention.placed_on_cache:
        inputs[convention.start] = start
    if convention.positions and (convention.cache_on_module or convention.placed_on_cache):
        inputs.setdefault(convention.positions, _positions(convention, input_ids, start))
    return inputs


def some(name: str | None) -> str:
    """The name of an argument that there is."""
    assert name is not None, "a check asked for what the module does not have: its `needs` are incomplete"
    return name


def _holding(convention: Convention, cache: Any) -> dict[str, Any]:
    """The arguments that hold a cache: one, or keys and values."""
    if convention.past_values is None:
        return {some(convention.past): cache}
    keys, values = cache or (None, None)
    return {some(convention.past): keys, convention.past_values: values}


def _positions(convention: Convention, input_ids: Tensor, start: int) -> Tensor:
    """Of tokens after ``start`` others, without padding."""
    positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
    return positions if convention.positions_are_shared else positions.expand_as(input_ids)
