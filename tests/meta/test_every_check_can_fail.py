"""Every check fails on a model with one line wrong, names that bug, and says it without raising."""

from __future__ import annotations

import pytest

from diymodel.verify.registry import list_checks
from tests.meta.broken import BROKEN, Broken, verdict

CHECKS = {check.id: check for check in list_checks()}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_the_check_fails_on_the_broken_model(broken: Broken) -> None:
    lacks = [why for need in CHECKS[broken.check].needs if (why := broken.subject().missing(need))]
    assert not lacks
    result = verdict(broken)
    assert result.status == "failed", result
    assert result.failure is not None
    assert "the subject raised" not in result.failure.message
    assert broken.bug in result.failure.likely_causes


def test_no_check_is_without_a_broken_model() -> None:
    assert {broken.check for broken in BROKEN} == set(CHECKS)


def test_broken_models_are_told_apart_by_their_ids() -> None:
    assert len({broken.id for broken in BROKEN}) == len(BROKEN)
