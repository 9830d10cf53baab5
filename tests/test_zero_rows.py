"""Zeros that a chunk on a cache goes on with, told from room that is made for what it gives."""

from __future__ import annotations

import pytest

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Failure, Result
from diymodel.verify.symptoms import Patient, list_symptoms
from diymodel.zoo.base import BASES

CONFIG = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 16}
STATE = "window, ssm = state\n"
LOST = "window, ssm = state[0], torch.zeros_like(state[1]) if T > 1 else state[1]\n"
GIVEN = "        y: Tensor = "
ROOM = """        if T > 1:
            room = torch.zeros_like(u)
            for t, one in enumerate(outputs):
                {fill}
            outputs = room.unbind(1)
"""


@pytest.mark.parametrize(
    "fill", ["room[:, t] = one", "room[:, t].copy_(one)", "room.narrow(1, t, 1).copy_(one[:, None])"]
)
@pytest.mark.parametrize("lost", [False, True])
def test_room_that_is_filled_is_no_state_that_is_lost(lost: bool, fill: str) -> None:
    base = BASES["statespace"]
    assert base.source.count(GIVEN) == base.source.count(STATE) == 1
    source = base.source.replace(GIVEN, ROOM.format(fill=fill) + GIVEN)
    if lost:
        source = source.replace(STATE, LOST)
    check = next(check for check in list_checks() if check.id == "decode.chunks")
    failed = {check.id: Result(check, "failed", failure=Failure("told", (), CONFIG, {"config": CONFIG}, ""))}
    assert list_symptoms()["decode.begins_with_zeros"].ask(Patient(base.subject(source), failed)) is lost
