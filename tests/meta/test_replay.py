"""What a report prints is enough to see the same failure again."""

from __future__ import annotations

import json

import pytest

from diymodel.verify.registry import list_checks
from diymodel.verify.runner import replay
from tests.meta.broken import BROKEN, Broken, verdict

CHECKS = {check.id: check for check in list_checks()}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_recorded_values_replay_to_the_same_failure(broken: Broken) -> None:
    first = verdict(broken).failure
    assert first is not None
    values = json.loads(json.dumps(first.values))
    again = replay(broken.subject(), CHECKS[broken.check], values).failure
    assert again is not None
    assert (again.message, again.likely_causes, again.values) == (first.message, first.likely_causes, first.values)


def test_recorded_values_of_another_check_are_refused_by_name() -> None:
    broken = BROKEN[0]
    result = replay(broken.subject(), CHECKS[broken.check], {"config": {}})
    assert result.failure is not None
    assert "has no value 'weights'" in result.failure.message
