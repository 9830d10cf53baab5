"""Padding on the right fills a rectangle and does nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.properties.compare import ROUNDING, assert_identical, assert_refused, assert_same, require


def padding_changes_no_real_logit(
    model: nn.Module, input_ids: Tensor, lengths: Tensor, tolerance: float = ROUNDING
) -> None:
    """Every row has, at its real positions, the logits it has alone and unpadded."""
    logits = model(input_ids, seq_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(input_ids[row : row + 1, :length])
        assert_same(logits[row : row + 1, :length], alone, f"logits of row {row}, padded from {length} on", tolerance)


def padding_content_is_irrelevant(
    model: nn.Module, input_ids: Tensor, lengths: Tensor, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """Other tokens at the padding change no real logit, in the call itself or in what continues its cache."""
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]
    edited = torch.where(real, input_ids, other_ids)
    before, past = model(input_ids, seq_lengths=lengths, use_cache=True)
    after, edited_past = model(edited, seq_lengths=lengths, use_cache=True)
    assert_same(after[real], before[real], "real logits after an edit of the padding", tolerance)
    step = other_ids[:, :1]
    before, after = model(step, past_key_values=past), model(step, past_key_values=edited_past)
    assert_same(after, before, "logits of the next step after an edit of the padding", tolerance)


def nan_at_the_padding_does_not_leak(
    model: nn.Module, embedding_weight: Tensor, input_ids: Tensor, lengths: Tensor, padding: int
) -> None:
    """The same with NaN as the embedding of the padding token, which stands at no real position: 0 · NaN is NaN."""
    real = torch.arange(input_ids.shape[1]) < lengths[:, None]
    padded = torch.where(real, input_ids, padding)
    others = torch.arange(len(embedding_weight)) != padding  # with tied weights, the head's row is NaN as well
    logits = []
    for poisoned in (False, True):
        if poisoned:
            embedding_weight.data[padding] = torch.nan
        prefill, past = model(padded, seq_lengths=lengths, use_cache=True)
        step = model(input_ids[:, :1], past_key_values=past)
        logits.append((prefill[real][:, others], step[..., others]))
    for name, before, after in zip(("prefill", "next step"), *logits, strict=True):
        assert_identical(after, before, f"logits of the {name} with NaN at the padding")


def padded_rows_stay_finite(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> None:
    """Logits are finite everywhere, even in a row that is all padding."""
    logits = model(input_ids, seq_lengths=lengths)
    broken = (~logits.isfinite()).any(dim=(1, 2)).nonzero().flatten().tolist()
    require(not broken, f"logits: expected finite values, seen others in rows {broken} of lengths {lengths.tolist()}")


def mask_and_lengths_agree(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> None:
    """A 0/1 mask of integers, floats or booleans says the same as the lengths."""
    expected = model(input_ids, seq_lengths=lengths)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    for dtype in (torch.int64, torch.bool, torch.float32):
        assert_identical(model(input_ids, attention_mask=mask.to(dtype)), expected, f"logits with a mask of {dtype}")


def wrong_mask_is_refused(model: nn.Module, input_ids: Tensor, mask: Tensor) -> None:
    """A mask that does not say "1 for tokens, then 0 for padding" is an error, never silently misread."""
    what = f"attention_mask {mask.tolist()}"
    assert_refused(lambda: model(input_ids, attention_mask=mask), "attention_mask", what)
