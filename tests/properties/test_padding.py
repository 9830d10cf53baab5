"""The properties of ``padding.py`` on our model."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.properties import padding
from tests.properties.strategies import Case, batches, cases, edits, lengths


@given(case=cases(), data=st.data())
def test_padding_changes_no_real_logit(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case.num_rows, case.length), "lengths")
    padding.padding_changes_no_real_logit(case.model(), case.input_ids, row_lengths)


@given(case=cases(min_length=2, room=1), data=st.data())
def test_padding_content_is_irrelevant(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case.num_rows, case.length, shortest=0), "lengths")
    other_ids = data.draw(edits(case), "other_ids")
    padding.padding_content_is_irrelevant(case.model(), case.input_ids, row_lengths, other_ids)


@given(case=cases(min_length=2, room=1), data=st.data())
def test_nan_at_the_padding_does_not_leak(case: Case, data: st.DataObject) -> None:
    """The last token of the vocabulary is kept out of the real positions and is the padding."""
    row_lengths = data.draw(lengths(case.num_rows, case.length, shortest=0), "lengths")
    model, last = case.model(), case.config.vocab_size - 1
    ids = case.input_ids.clamp(max=last - 1)
    padding.nan_at_the_padding_does_not_leak(model, model.model.embed_tokens.weight, ids, row_lengths, last)


@given(case=cases(), data=st.data())
def test_padded_rows_stay_finite(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case.num_rows, case.length, shortest=0), "lengths")
    padding.padded_rows_stay_finite(case.model(torch.float32), case.input_ids, row_lengths)


@given(case=cases(), data=st.data())
def test_mask_and_lengths_agree(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case.num_rows, case.length, shortest=0), "lengths")
    padding.mask_and_lengths_agree(case.model(), case.input_ids, row_lengths)


def _is_right_padded(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())


@given(case=cases(min_length=2), data=st.data())
def test_wrong_mask_is_refused(case: Case, data: st.DataObject) -> None:
    """Left-padded, with a hole, or with other values than 0 and 1."""
    mask = data.draw(batches(case.config, case.num_rows, case.length).filter(lambda m: not _is_right_padded(m)), "mask")
    padding.wrong_mask_is_refused(case.model(), case.input_ids, mask)
    zero_one = torch.ones_like(mask)
    zero_one[data.draw(st.integers(0, case.num_rows - 1)), : data.draw(st.integers(1, case.length - 1))] = 0
    padding.wrong_mask_is_refused(case.model(), case.input_ids, zero_one)
