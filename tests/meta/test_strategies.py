"""What trials are drawn from reaches every feature of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, find, settings

from diymodel import DIYConfig
from diymodel.verify.strategies import chunk_sizes, configs, real_lengths
from tests.strategies import Case, cases

GENERATE = settings(max_examples=500, phases=[Phase.generate])
LENGTH = 5


@pytest.mark.parametrize(
    "feature",
    [
        lambda config: config.num_layers == 1,
        lambda config: config.num_layers > 1,
        lambda config: 1 == config.kv_heads < config.num_heads,
        lambda config: 1 < config.kv_heads < config.num_heads,
        lambda config: 1 < config.kv_heads == config.num_heads,
        lambda config: config.head_size > 2,
        lambda config: config.dropout > 0,
        lambda config: config.rms_norm_eps != 1e-6,
        lambda config: config.rope_theta != 10000.0,
        lambda config: config.tie_word_embeddings,
        lambda config: config.max_seq_len == LENGTH,
        lambda config: config.max_seq_len > LENGTH,
    ],
)
def test_configurations_have_every_feature(feature: Callable[[DIYConfig], bool]) -> None:
    find(configs(LENGTH).map(DIYConfig.from_dict), feature, settings=GENERATE)


def test_chunks_are_one_by_one_and_of_several_and_cover_all() -> None:
    for sizes in ([1] * LENGTH, [LENGTH - 1, 1], [1, LENGTH - 1]):
        find(chunk_sizes(LENGTH), lambda drawn, sizes=sizes: drawn == sizes, settings=GENERATE)
    assert find(chunk_sizes(1), lambda drawn: True, settings=GENERATE) == [1]


@pytest.mark.parametrize("lengths", [[1, LENGTH], [LENGTH, 1], [LENGTH, LENGTH]])
def test_rows_are_short_and_full(lengths: list[int]) -> None:
    find(real_lengths(2, LENGTH), lambda drawn: drawn == lengths, settings=GENERATE)


@pytest.mark.parametrize(
    "feature",
    [
        lambda case: case.length == 1,
        lambda case: 1 < case.length == case.config.max_seq_len,
        lambda case: case.num_rows > 1,
        lambda case: case.sharpness > 1,
    ],
)
def test_cases_of_our_model_have_every_feature(feature: Callable[[Case], bool]) -> None:
    find(cases(), feature, settings=GENERATE)


def test_a_case_is_its_repr() -> None:
    case = find(cases(), lambda case: case.config.num_layers > 1, settings=GENERATE)
    again = eval(repr(case), {"Case": Case, "DIYConfig": DIYConfig})
    assert again == case
    for ours, theirs in zip(again.model().parameters(), case.model().parameters(), strict=True):
        assert ours.equal(theirs)
