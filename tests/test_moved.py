"""The place whose positions are wrong is found, although to move them everywhere would do harm before it is reached."""

from __future__ import annotations

from diymodel.verify.options import PROFILES
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.symptoms import Patient, list_symptoms
from diymodel.zoo.bug import list_bugs


def test_a_counter_that_is_set_and_not_advanced_is_mended_beside_other_counting() -> None:
    """Rolling counts the distances of its window by ``arange`` as well, and its first wrong step is not its first."""
    slug, new = "position-restarts-in-decode", "Rolled(tokens.shape[1],"
    (bug,) = (bug for bug in list_bugs() if (bug.slug, bug.new) == (slug, new))
    check = next(check for check in list_checks() if check.id == "decode.cached_equals_full")
    failed = verify_one(bug.subject(), check, Settings(PROFILES["quick"], shrink=False))
    patient = Patient(bug.subject(), {check.id: failed})
    assert list_symptoms()["repair.positions_of_tokens_seen"].ask(patient) is True
