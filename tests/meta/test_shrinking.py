"""A failure is shown on an example that a person can redo by hand."""

from __future__ import annotations

import pytest

from tests.meta.broken import BROKEN, Broken, verdict

SHIFTED = Broken(
    "decode.cached_equals_full",
    "position-restarts-in-decode",
    "Rotary",
    "RotaryBlock",
    "torch.arange(start, start + T)",
    "torch.arange(start, start + T) + (past is not None)",
)


def test_a_rotary_shift_of_one_position_shrinks_to_one_layer_and_three_tokens() -> None:
    failure = verdict(SHIFTED).failure
    assert failure is not None
    assert failure.config["num_layers"] == 1
    assert failure.config["num_heads"] <= 2
    assert len(failure.values["tokens"]) == 1
    assert len(failure.values["tokens"][0]) <= 3


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_no_example_is_larger_than_two_layers_and_three_rows_of_three_tokens(broken: Broken) -> None:
    failure = verdict(broken).failure
    assert failure is not None
    assert failure.config["num_layers"] <= 2
    rows = failure.values.get("tokens", [])
    assert len(rows) <= 3 or not isinstance(rows[0], list)
    assert all(len(row) <= 3 for row in rows if isinstance(row, list))
