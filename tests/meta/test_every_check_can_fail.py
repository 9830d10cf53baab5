"""Every check fails on a model with one bug, names that bug, and says it without raising."""

from __future__ import annotations

import pytest

from diymodel.zoo.bug import Bug
from tests.meta.verdicts import CHECKS, KILL_IDS, KILLS, verdict


@pytest.mark.parametrize(("bug", "check_id"), KILLS, ids=KILL_IDS)
def test_the_check_fails_on_the_broken_model(bug: Bug, check_id: str) -> None:
    result = verdict(bug, check_id)
    assert result.status == "failed", result
    assert result.failure is not None
    assert "the subject raised" not in result.failure.message
    assert bug.slug in result.failure.likely_causes


def test_no_check_is_without_a_bug_that_it_kills() -> None:
    assert {check_id for _, check_id in KILLS} == set(CHECKS)


def test_bugs_are_told_apart_by_their_ids() -> None:
    assert len(set(KILL_IDS)) == len(KILL_IDS)
