"""Every check fails on a model with one bug, names that bug, and shows it on an example that fits on paper and replays.

One test asks all of it of one run: these are the slowest tests, and xdist would run a bug anew for each of several. An
example is made small once for a check; of the other bugs it is as it was found.
"""

from __future__ import annotations

import json
import re

import pytest

from diymodel.verify.report import Failure
from diymodel.verify.runner import replay
from diymodel.zoo.bug import Bug
from tests.meta.texts import assert_says
from tests.meta.verdicts import CHECKS, CRASH, KILL_IDS, KILLS, ON_PAPER, RAISES_TOO, broken, verdict


@pytest.mark.parametrize(("bug", "check_id"), KILLS, ids=KILL_IDS)
def test_the_check_fails_on_the_broken_model(bug: Bug, check_id: str) -> None:
    shrink = bug is ON_PAPER.get(check_id) or bug.slug in RAISES_TOO
    result = verdict(bug, check_id, shrink)
    assert result.status == "failed", result
    assert result.failure is not None
    crashes = bug.id in CRASH
    assert ("the subject raised RuntimeError" in result.failure.message) == crashes
    # What raises says so itself; the diagnosis names it, and the check among its causes.
    assert bug.slug in (CHECKS[check_id].causes if crashes else result.failure.likely_causes)
    if not crashes:
        assert_says(result.failure, check_id)
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in result.failure.values), "they are shown to people"
    if shrink:
        assert_small(result.failure)
    assert_replays(result.failure, bug, check_id)


def assert_small(failure: Failure) -> None:
    """Two layers, and three rows of three tokens, can be redone by hand."""
    assert failure.config["num_layers"] <= 2
    rows = failure.values.get("tokens", [])
    assert len(rows) <= 3 or not isinstance(rows[0], list)
    assert all(len(row) <= 3 for row in rows if isinstance(row, list))


def assert_replays(first: Failure, bug: Bug, check_id: str) -> None:
    """What a report prints is enough to see the same failure again."""
    values = json.loads(json.dumps(first.values))
    again = replay(broken(bug), CHECKS[check_id], values).failure
    assert again is not None
    assert (again.message, again.likely_causes, again.values) == (first.message, first.likely_causes, first.values)


def test_no_check_is_without_a_bug_that_it_kills() -> None:
    assert {check_id for _, check_id in KILLS} == set(CHECKS)


def test_bugs_are_told_apart_by_their_ids() -> None:
    assert len(set(KILL_IDS)) == len(KILL_IDS)
