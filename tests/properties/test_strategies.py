"""What is drawn reaches every feature, and prints as Python that makes it again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, find, settings

from diymodel import DIYConfig
from tests.properties.strategies import Case, cases, label_masks

GENERATE = settings(max_examples=500, phases=[Phase.generate])


@pytest.mark.parametrize(
    "feature",
    [
        lambda case: case.config.num_layers == 1,
        lambda case: case.config.num_layers > 1,
        lambda case: 1 == case.config.kv_heads < case.config.num_heads,
        lambda case: 1 < case.config.kv_heads < case.config.num_heads,
        lambda case: case.config.dropout > 0,
        lambda case: case.config.rms_norm_eps != 1e-6,
        lambda case: case.config.rope_theta != 10000.0,
        lambda case: case.config.tie_word_embeddings,
        lambda case: case.length == 1,
        lambda case: 1 < case.length == case.config.max_seq_len,
        lambda case: case.num_rows > 1,
        lambda case: case.sharpness > 1,
    ],
)
def test_every_feature_is_drawn(feature: Callable[[Case], bool]) -> None:
    find(cases(), feature, settings=GENERATE)


@pytest.mark.parametrize("live", [0, 1, 6])
def test_label_masks_reach_none_one_and_all(live: int) -> None:
    find(label_masks(2, 3), lambda mask: int(mask.sum()) == live, settings=GENERATE)


def test_a_case_is_its_repr() -> None:
    case = find(cases(), lambda case: case.config.num_layers > 1, settings=GENERATE)
    again = eval(repr(case), {"Case": Case, "DIYConfig": DIYConfig})
    assert again == case
    for ours, theirs in zip(again.model().parameters(), case.model().parameters(), strict=True):
        assert ours.equal(theirs)
