"""A failure is shown on an example that a person can redo by hand."""

from __future__ import annotations

import pytest

from diymodel.zoo.bug import Bug
from tests.meta.verdicts import KILL_IDS, KILLS, verdict

SHIFTED = Bug(
    "position-restarts-in-decode",
    "rotary",
    "torch.arange(start, start + T)",
    "torch.arange(start, start + T) + (past is not None)",
    kills=("decode.cached_equals_full",),
)


def test_a_rotary_shift_of_one_position_shrinks_to_one_layer_and_three_tokens() -> None:
    failure = verdict(SHIFTED, SHIFTED.kills[0]).failure
    assert failure is not None
    assert failure.config["num_layers"] == 1
    assert failure.config["num_heads"] <= 2
    assert len(failure.values["tokens"]) == 1
    assert len(failure.values["tokens"][0]) <= 3


@pytest.mark.parametrize(("bug", "check_id"), KILLS, ids=KILL_IDS)
def test_no_example_is_larger_than_two_layers_and_three_rows_of_three_tokens(bug: Bug, check_id: str) -> None:
    failure = verdict(bug, check_id).failure
    assert failure is not None
    assert failure.config["num_layers"] <= 2
    rows = failure.values.get("tokens", [])
    assert len(rows) <= 3 or not isinstance(rows[0], list)
    assert all(len(row) <= 3 for row in rows if isinstance(row, list))
