"""No check fails on a correct model, whatever its convention; what a model lacks is skipped with a reason."""

from __future__ import annotations

import functools

import pytest

from diymodel.verify.registry import Check, list_checks
from diymodel.verify.runner import run_check
from diymodel.verify.subject import Subject, resolve
from tests.meta import bases

EXAMPLES = 3
LACKS = {  # what each base does not have; nothing else may be skipped
    "diymodel": {"loss"},
    "NanoGPT": {"cache", "padding"},
    "Rotary": {"padding", "loss"},
    "Hub": {"cache_value"},
    "Plain": {"cache", "padding", "loss"},
}
NOT_APPLICABLE = {("Plain", "state.tied_weights_stay_tied")}  # it never shares a weight


@functools.cache
def subject(name: str) -> Subject:
    if name == "diymodel":
        return resolve(None)
    return Subject(getattr(bases, name), name, ("strict_context", "finite_loss"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("check", list_checks(), ids=lambda check: check.id)
@pytest.mark.parametrize("name", LACKS)
def test_a_correct_model_passes(name: str, check: Check, seed: int) -> None:
    lacks = {need: why for need in check.needs if (why := subject(name).missing(need))}
    if lacks:
        assert lacks.keys() & LACKS[name]
        assert all(lacks.values())
        return
    result = run_check(subject(name), check, EXAMPLES, seed)
    expected = "skipped" if (name, check.id) in NOT_APPLICABLE else "passed"
    assert result.status == expected, result
    assert (result.reason is not None) == (expected == "skipped")
