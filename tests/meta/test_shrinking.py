"""The known hard example shrinks to the expected one. Of each check and class of bugs: test_every_check_can_fail.py."""

from __future__ import annotations

from diymodel.zoo.bug import Bug
from tests.meta.verdicts import verdict

SHIFTED = Bug(
    "position-restarts-in-decode",
    "rotary",
    "torch.arange(start, start + T, device=x.device)",
    "torch.arange(start, start + T, device=x.device) + (past is not None)",
    kills=("decode.cached_equals_full",),
)


def test_a_rotary_shift_of_one_position_shrinks_to_one_layer_and_three_tokens() -> None:
    failure = verdict(SHIFTED, SHIFTED.kills[0]).failure
    assert failure is not None
    assert failure.config["num_layers"] == 1
    assert failure.config["num_heads"] <= 2
    assert len(failure.values["tokens"]) == 1
    assert len(failure.values["tokens"][0]) <= 3
