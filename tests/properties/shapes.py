"""What a model returns, whoever shares the batch and however the input lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.properties.compare import ROUNDING, assert_identical, assert_same, require


def logits_are_well_formed(model: nn.Module, input_ids: Tensor, vocab_size: int, dtype: torch.dtype) -> None:
    """One finite score in the model's dtype for every row, position and token of the vocabulary."""
    logits = model(input_ids)
    shape = (*input_ids.shape, vocab_size)
    require(logits.shape == shape, f"logits: expected shape {shape}, seen {tuple(logits.shape)}")
    require(logits.dtype == dtype, f"logits: expected {dtype}, seen {logits.dtype}")
    broken = (~logits.isfinite()).nonzero().tolist()
    require(not broken, f"logits: expected finite values, seen others at (row, position, token) {broken}")


def logits_equal(model: nn.Module, input_ids: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """The logits are those of an independent implementation: the only property that sees a mistake on all paths."""
    assert_same(model(input_ids), expected, "logits against the independent implementation", tolerance)


def memory_layout_does_not_matter(model: nn.Module, input_ids: Tensor) -> None:
    """A view with gaps gives what its contiguous copy gives."""
    gaps = torch.stack((input_ids, torch.zeros_like(input_ids)), dim=-1)[..., 0]
    assert_identical(model(gaps), model(input_ids), "logits of a non-contiguous input")


def inputs_are_left_alone(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> None:
    """A call writes neither into the tokens nor into the lengths."""
    ids_before, lengths_before = input_ids.clone(), lengths.clone()
    model(input_ids, seq_lengths=lengths)
    model(input_ids, seq_lengths=lengths, use_cache=True)
    assert_identical(input_ids, ids_before, "input_ids after the call")
    assert_identical(lengths, lengths_before, "seq_lengths after the call")


def equal_calls_are_equal(model: nn.Module, input_ids: Tensor, other_ids: Tensor) -> None:
    """The same input gives the same logits again, whatever was called in between."""
    first = model(input_ids)
    assert_identical(model(input_ids), first, "logits of the second equal call")
    model(other_ids)
    assert_identical(model(input_ids), first, "logits of an equal call after another one")


def row_alone_equals_row_in_batch(model: nn.Module, input_ids: Tensor, tolerance: float = ROUNDING) -> None:
    """A row's logits do not depend on the rows beside it."""
    alone = torch.cat([model(row[None]) for row in input_ids])
    assert_same(model(input_ids), alone, "logits in the batch against the row alone", tolerance)


def permuting_rows_permutes_logits(
    model: nn.Module, input_ids: Tensor, order: Tensor, tolerance: float = ROUNDING
) -> None:
    """Rows in another order give their logits in that order."""
    assert_same(model(input_ids[order]), model(input_ids)[order], "logits of permuted rows", tolerance)


def kept_logits_equal_the_last(
    model: nn.Module, input_ids: Tensor, count: int, lengths: Tensor | None = None, tolerance: float = ROUNDING
) -> None:
    """``logits_to_keep=count`` gives the last ``count`` real positions of each row of the full logits."""
    full = model(input_ids, seq_lengths=lengths)
    ends = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths.tolist()
    expected = torch.stack([row[end - count : end] for row, end in zip(full, ends, strict=True)])
    seen = model(input_ids, seq_lengths=lengths, logits_to_keep=count)
    assert_same(seen, expected, f"logits with logits_to_keep={count}", tolerance)
