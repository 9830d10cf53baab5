"""A replay is refused where its values are another check's. That failures replay: test_every_check_can_fail.py."""

from __future__ import annotations

import pytest

from diymodel.verify.runner import replay
from tests.meta.verdicts import CHECKS, KILLS


def test_recorded_values_of_another_check_are_refused_by_name() -> None:
    bug, check_id = KILLS[0]
    with pytest.raises(ValueError, match="has no value 'weights'"):
        replay(bug.subject(), CHECKS[check_id], {"config": {}})
