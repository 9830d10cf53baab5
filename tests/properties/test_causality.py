"""The properties of ``causality.py`` on our model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.properties import causality
from tests.properties.strategies import SEEDS, Case, cases, edits


@given(case=cases(min_length=2), data=st.data())
def test_prefix_unchanged_by_later_edit(case: Case, data: st.DataObject) -> None:
    model, other_ids = case.model(), data.draw(edits(case), "other_ids")
    for cut in range(1, case.length):
        causality.prefix_unchanged_by_later_edit(model, case.input_ids, cut, other_ids)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=lambda backend: backend.name)
@given(case=cases(min_length=2), data=st.data())
def test_prefix_unchanged_under_each_backend(backend: SDPBackend, case: Case, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, case.length - 1), "cut")
    other_ids = data.draw(edits(case), "other_ids")
    with sdpa_kernel(backend):
        causality.prefix_unchanged_by_later_edit(case.model(), case.input_ids, cut, other_ids)


@given(case=cases(min_length=2))
def test_prefix_unchanged_by_truncation(case: Case) -> None:
    model = case.model()
    for cut in range(1, case.length):
        causality.prefix_unchanged_by_truncation(model, case.input_ids, cut)


@given(case=cases(min_length=3), data=st.data())
def test_prefix_unchanged_by_later_edit_through_cache(case: Case, data: st.DataObject) -> None:
    start = data.draw(st.integers(1, case.length - 2), "start")
    cut = data.draw(st.integers(start + 1, case.length - 1), "cut")
    other_ids = data.draw(edits(case), "other_ids")
    causality.prefix_unchanged_by_later_edit_through_cache(case.model(), case.input_ids, start, cut, other_ids)


@given(case=cases(min_length=2), seed=SEEDS, data=st.data())
def test_prefix_unchanged_by_later_edit_in_training(case: Case, seed: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, case.length - 1), "cut")
    other_ids = data.draw(edits(case), "other_ids")
    causality.prefix_unchanged_by_later_edit_in_training(case.model(), case.input_ids, cut, other_ids, seed)


@given(case=cases(min_length=2, distinct=True, max_sharpness=1), data=st.data())
def test_no_gradient_from_later_tokens(case: Case, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, case.length - 1), "cut")
    model = case.model()
    causality.no_gradient_from_later_tokens(model, model.model.embed_tokens, case.input_ids, cut)


@given(case=cases(max_sharpness=1), data=st.data())
def test_position_sees_itself(case: Case, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, case.length - 1), "position")
    causality.position_sees_itself(case.model(), case.input_ids, position, data.draw(edits(case), "other_ids"))


@given(case=cases(min_length=2, max_sharpness=1), data=st.data())
def test_last_position_sees_the_first(case: Case, data: st.DataObject) -> None:
    causality.last_position_sees_the_first(case.model(), case.input_ids, data.draw(edits(case), "other_ids"))


@given(case=cases(min_length=3, distinct=True, max_sharpness=1))
def test_order_of_the_past_matters(case: Case) -> None:
    causality.order_of_the_past_matters(case.model(), case.input_ids)
