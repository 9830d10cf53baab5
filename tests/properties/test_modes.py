"""The properties of ``modes.py`` on our model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.properties import modes
from tests.properties.strategies import SEEDS, Case, cases


@given(case=cases(dropout=0.5), seed=SEEDS, dropout=st.sampled_from((0.1, 0.5, 0.9)))
def test_dropout_is_on_in_training(case: Case, seed: int, dropout: float) -> None:
    case = replace(case, config=replace(case.config, dropout=dropout))
    modes.dropout_is_on_in_training(case.model(), case.input_ids, seed)


@given(case=cases(dropout=0.5))
def test_dropout_is_off_in_eval(case: Case) -> None:
    twin = replace(case, config=replace(case.config, dropout=0.0))
    modes.dropout_is_off_in_eval(case.model(), twin.model(), case.input_ids)


@given(case=cases(dropout=0.0))
def test_modes_agree_without_dropout(case: Case) -> None:
    modes.modes_agree_without_dropout(case.model(), case.input_ids)


@given(case=cases())
def test_mode_reaches_every_submodule(case: Case) -> None:
    modes.mode_reaches_every_submodule(case.model())


@given(case=cases(room=1))
def test_cache_is_refused_in_training(case: Case) -> None:
    modes.cache_is_refused_in_training(case.model(), case.input_ids)
