"""The properties of ``shapes.py`` on our model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import shapes
from tests.properties.strategies import Case, batches, cases, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@given(case=cases())
def test_logits_are_well_formed(dtype: torch.dtype, case: Case) -> None:
    shapes.logits_are_well_formed(case.model(dtype), case.input_ids, case.config.vocab_size, dtype)


@given(case=cases())
def test_memory_layout_does_not_matter(case: Case) -> None:
    shapes.memory_layout_does_not_matter(case.model(), case.input_ids)


@given(case=cases(), data=st.data())
def test_inputs_are_left_alone(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case.num_rows, case.length), "lengths")
    shapes.inputs_are_left_alone(case.model(), case.input_ids, row_lengths)


@given(case=cases(), data=st.data())
def test_equal_calls_are_equal(case: Case, data: st.DataObject) -> None:
    other_ids = data.draw(batches(case.config, 1, case.config.max_seq_len), "other_ids")
    shapes.equal_calls_are_equal(case.model(), case.input_ids, other_ids)


@given(case=cases(min_rows=2))
def test_row_alone_equals_row_in_batch(case: Case) -> None:
    shapes.row_alone_equals_row_in_batch(case.model(), case.input_ids)


@given(case=cases(min_rows=2), data=st.data())
def test_permuting_rows_permutes_logits(case: Case, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(case.num_rows)), "order"))
    shapes.permuting_rows_permutes_logits(case.model(), case.input_ids, order)


@given(case=cases(), data=st.data())
def test_kept_logits_equal_the_last(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(st.none() | lengths(case.num_rows, case.length), "lengths")
    shortest = case.length if row_lengths is None else int(row_lengths.min())
    count = data.draw(st.integers(1, shortest), "count")
    shapes.kept_logits_equal_the_last(case.model(), case.input_ids, count, row_lengths)
