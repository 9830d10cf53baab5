"""What a report prints is enough to see the same failure again."""

from __future__ import annotations

import json

import pytest

from diymodel.verify.runner import replay
from diymodel.zoo.bug import Bug
from tests.meta.verdicts import CHECKS, KILL_IDS, KILLS, verdict


@pytest.mark.parametrize(("bug", "check_id"), KILLS, ids=KILL_IDS)
def test_recorded_values_replay_to_the_same_failure(bug: Bug, check_id: str) -> None:
    first = verdict(bug, check_id).failure
    assert first is not None
    values = json.loads(json.dumps(first.values))
    again = replay(bug.subject(), CHECKS[check_id], values).failure
    assert again is not None
    assert (again.message, again.likely_causes, again.values) == (first.message, first.likely_causes, first.values)


def test_recorded_values_of_another_check_are_refused_by_name() -> None:
    bug, check_id = KILLS[0]
    with pytest.raises(ValueError, match="has no value 'weights'"):
        replay(bug.subject(), CHECKS[check_id], {"config": {}})
