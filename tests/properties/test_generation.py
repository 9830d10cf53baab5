"""The properties of ``generation.py`` on our ``generate``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diymodel.generate import generate
from tests.properties import generation
from tests.properties.strategies import SEEDS, Case, cases, lengths

NEW = 4
CASES = cases(room=NEW)
NUM_NEW = st.integers(0, NEW)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0, "seed": 7},
        {"temperature": 0, "top_k": 3, "top_p": 0.5},
        {"temperature": 1e-9, "seed": 7},
        {"temperature": 1.0, "top_k": 1, "seed": 7},
        {"temperature": 1.0, "top_p": 1e-9, "seed": 7},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
)
@given(case=CASES, new=NUM_NEW)
def test_greedy_equals_the_loop(settings: dict[str, Any], case: Case, new: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="top_k and top_p are ignored")
        generation.greedy_equals_the_loop(generate, case.model(), case.input_ids, new, **settings)


@given(
    case=CASES,
    new=NUM_NEW,
    seed=SEEDS,
    temperature=st.sampled_from((1.0, 0.5, 10.0)),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.sampled_from((0.1, 0.5, 0.9, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 1.5)),
)
def test_cache_does_not_change_the_draws(case: Case, new: int, seed: int, **settings: Any) -> None:
    generation.cache_does_not_change_the_draws(generate, case.model(), case.input_ids, new, seed, **settings)


@given(case=CASES)
def test_seeds_draw_different_tokens(case: Case) -> None:
    generation.seeds_draw_different_tokens(generate, case.model(), case.input_ids, NEW)


@given(case=CASES, new=NUM_NEW, data=st.data())
def test_ragged_rows_equal_rows_alone(case: Case, new: int, data: st.DataObject) -> None:
    """Often with an end-of-sequence token that some row does generate."""
    row_lengths = data.draw(lengths(case.num_rows, case.length), "lengths")
    model = case.model()
    greedy = generation.greedy_loop(model, case.input_ids[:1, : row_lengths[0]], new)[0].tolist()
    eos = data.draw(st.none() | st.sampled_from(greedy), "eos")
    padding = data.draw(st.integers(0, case.config.vocab_size - 1), "padding")
    generation.ragged_rows_equal_rows_alone_in_generation(
        generate, model, case.input_ids, row_lengths, new, eos, padding
    )


@given(case=CASES, new=NUM_NEW, seed=SEEDS, beyond=st.integers(0, 100))
def test_wide_top_k_changes_nothing(case: Case, new: int, seed: int, beyond: int) -> None:
    top_k = case.config.vocab_size + beyond
    generation.wide_top_k_changes_nothing(generate, case.model(), case.input_ids, new, seed, top_k)


@given(case=CASES, fails=st.booleans(), data=st.data())
def test_everything_is_left_as_it_was(case: Case, fails: bool, data: st.DataObject) -> None:
    """From any mix of modes."""
    model = case.model()
    for module in model.modules():
        module.training = data.draw(st.booleans())
    generation.everything_is_left_as_it_was(generate, model, case.input_ids, NEW, fails)


@given(case=cases(), beyond=st.integers(1, 3))
def test_overlong_is_refused(case: Case, beyond: int) -> None:
    new = case.config.max_seq_len - case.length + beyond
    generation.overlong_is_refused(generate, case.model(), case.input_ids, new, "max_seq_len")
