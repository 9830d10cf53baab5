"""Decoding with a cache is a way to compute the same logits, and a cache is a value.

Every expected value comes from an uncached call on the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.properties.compare import ROUNDING, assert_identical, assert_same, require

Feed = Sequence[Sequence[int]]  # the new tokens of every row in one call, rows of different lengths


def cached_equals_uncached(
    model: nn.Module, input_ids: Tensor, sizes: Sequence[int], tolerance: float = ROUNDING
) -> None:
    """Fed in chunks of these sizes, each continuing the cache of the one before, the logits are those of one call."""
    past = None
    parts = []
    for chunk in torch.split(input_ids, list(sizes), dim=1):
        logits, past = model(chunk, past_key_values=past, use_cache=True)
        parts.append(logits)
    assert_same(torch.cat(parts, dim=1), model(input_ids), f"logits in chunks of {list(sizes)}", tolerance)


def ragged_rows_equal_rows_alone(
    model: nn.Module, feeds: Sequence[Feed], padding: int, tolerance: float = ROUNDING
) -> None:
    """Rows that get different numbers of tokens at each call have the logits that each has alone."""
    past = None
    seen: list[list[Tensor]] = [[] for _ in feeds[0]]
    for feed in feeds:
        longest = max(1, *(len(row) for row in feed))
        padded = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in feed])
        counts = torch.tensor([len(row) for row in feed])
        logits, past = model(padded, seq_lengths=counts, past_key_values=past, use_cache=True)
        for row, count in enumerate(counts.tolist()):
            seen[row].append(logits[row, :count])
    for row, parts in enumerate(seen):
        alone = torch.tensor([[token for feed in feeds for token in feed[row]]], dtype=torch.int64)
        if alone.numel():
            assert_same(torch.cat(parts)[None], model(alone), f"logits of ragged row {row}, alone", tolerance)


def branches_are_independent(
    model: nn.Module, prefix: Tensor, first: Tensor, second: Tensor, tolerance: float = ROUNDING
) -> None:
    """One cache continued twice: neither continuation disturbs the other, and the first comes out again bit for bit."""
    _, past = model(prefix, use_cache=True)
    logits, longer = model(first, past_key_values=past, use_cache=True)
    _check_continuation(model, (prefix, second), model(second, past_key_values=past), "second branch", tolerance)
    other, _ = model(second, past_key_values=past, use_cache=True)
    _check_continuation(model, (prefix, second), other, "second branch, cached", tolerance)
    _check_continuation(
        model, (prefix, first, second), model(second, past_key_values=longer), "first branch, continued", tolerance
    )
    assert_identical(model(first, past_key_values=past), logits, "logits of the first branch, taken again")


def unrelated_call_changes_nothing(
    model: nn.Module, prefix: Tensor, rest: Tensor, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """Calls about something else, cached or not, between prefill and decode leave no trace."""
    _, past = model(prefix, use_cache=True)
    model(other_ids)
    model(other_ids, use_cache=True)
    seen = model(rest, past_key_values=past)
    _check_continuation(model, (prefix, rest), seen, "logits after an unrelated call", tolerance)


def chosen_rows_continue(
    model: nn.Module, prefix: Tensor, rows: Tensor, rest: Tensor, tolerance: float = ROUNDING
) -> None:
    """Rows of a cache chosen, repeated or reordered by hand, as beam search does, continue as those rows."""
    _, past = model(prefix, use_cache=True)
    chosen = [({name: kv[rows] for name, kv in cached.items()}, position) for cached, position in past]
    seen = model(rest, past_key_values=chosen)
    _check_continuation(model, (prefix[rows], rest), seen, f"logits of cache rows {rows.tolist()}", tolerance)


def rollback_continues_the_prefix(
    model: nn.Module, input_ids: Tensor, keep: int, rest: Tensor, tolerance: float = ROUNDING
) -> None:
    """A cache with a smaller ``cached_pos`` continues from there; the whole cache stays what it was."""
    _, past = model(input_ids, use_cache=True)
    shorter = [(cached, keep) for cached, _ in past]
    seen = model(rest, past_key_values=shorter)
    _check_continuation(model, (input_ids[:, :keep], rest), seen, f"logits after rollback to {keep}", tolerance)
    seen = model(rest, past_key_values=past)
    _check_continuation(model, (input_ids, rest), seen, f"logits without the rollback to {keep}", tolerance)


def cache_keeps_no_graph(model: nn.Module, input_ids: Tensor) -> None:
    """Cached tensors carry no autograd graph, even with gradients enabled: memory would grow with every step."""
    with torch.enable_grad():
        _, past = model(input_ids, use_cache=True)
        _, past = model(input_ids[:, :1], past_key_values=past, use_cache=True)
    for layer, (cached, _) in enumerate(past):
        for name, kv in cached.items():
            require(
                not kv.requires_grad and kv.grad_fn is None,
                f"cached {name!r} of layer {layer}: expected no graph, seen one",
            )


def appending_is_in_place(model: nn.Module, input_ids: Tensor) -> None:
    """One token at a time, a cache moves only when its buffer is full, and all moves copy O(length) in total.

    Copying at every step would make the whole quadratic: length² / 2 positions.
    """
    _, past = model(input_ids[:, :1], use_cache=True)
    copied = 0
    for length in range(1, input_ids.shape[1]):
        _, longer = model(input_ids[:, length : length + 1], past_key_values=past, use_cache=True)
        keys, old = longer[0][0]["k"], past[0][0]["k"]
        if keys.data_ptr() != old.data_ptr():
            capacity = old.untyped_storage().nbytes() // (old.element_size() * old[:, :, 0].numel())
            require(
                length >= capacity,
                f"cache of capacity {capacity}: expected it to stay until it is full, seen it move at {length}",
            )
            copied += length
        past = longer
    total = input_ids.shape[1]
    require(copied <= 2 * total, f"appending {total} positions: expected at most {2 * total} copied, seen {copied}")


def _check_continuation(model: nn.Module, parts: tuple[Tensor, ...], seen: Any, what: str, tolerance: float) -> None:
    """``seen`` are the logits of the last of the parts of a sequence."""
    expected = model(torch.cat(parts, dim=1))[:, -parts[-1].shape[1] :]
    assert_same(seen, expected, what, tolerance)
