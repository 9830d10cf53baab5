"""No check fails on a correct model, whatever its convention; what a model lacks is skipped with a reason."""

from __future__ import annotations

import functools

import pytest

from diymodel.verify.registry import Check, list_checks
from diymodel.verify.runner import Settings, run_check
from diymodel.verify.subject import OWN, Subject, resolve
from diymodel.zoo.base import BASES

EXAMPLES = 3
LACKS = {OWN: frozenset({"left_padding", "window"}), **{name: base.lacks for name, base in BASES.items()}}
GIVEN = {"reference", "shifted", "window"}  # arguments of Subject, which most bases do without
NOT_APPLICABLE = {("plain", "state.tied_weights_stay_tied")}  # it never shares a weight


@functools.cache
def subject(name: str) -> Subject:
    return resolve(None) if name == OWN else BASES[name].subject()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("check", list_checks(), ids=lambda check: check.id)
@pytest.mark.parametrize("name", LACKS)
def test_a_correct_model_passes(name: str, check: Check, seed: int) -> None:
    lacks = {need: why for need in check.needs if (why := subject(name).missing(need))}
    if lacks:
        assert lacks.keys() & (LACKS[name] | GIVEN)
        assert all(lacks.values())
        return
    result = run_check(subject(name), check, Settings(EXAMPLES, seed))
    expected = "skipped" if (name, check.id) in NOT_APPLICABLE else "passed"
    assert result.status == expected, result
    assert (result.reason is not None) == (expected == "skipped")
