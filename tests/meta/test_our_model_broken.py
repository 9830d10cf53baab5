"""Our own model, broken in one place at a time: the checks of the harness and our own tests that must fail on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings

from diymodel.verify.randomness import constants_from_no_module
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from tests import test_cache, test_generate, test_loss, test_model, test_state
from tests.meta.mutations import MUTATIONS, Mutation
from tests.meta.verdicts import CHECKS, EXAMPLES

BY_CHECK = [(mutation, id) for mutation in MUTATIONS for id in mutation.checks]
BY_TEST = [(mutation, test) for mutation in MUTATIONS for test in mutation.tests]
CAUSES = {cause for check in CHECKS.values() for cause in check.causes}
# Of a test of random models: the same examples each time, whatever else is imported, and the first failure will do,
# however large.
BRIEF = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    deadline=None,
)


def function_of(test: Callable[[], None]) -> Callable[..., None]:
    """Without the arguments that pytest gives it elsewhere."""
    return getattr(test, "func", test)


def name_of(test: Callable[[], None]) -> str:
    return function_of(test).__name__


@pytest.mark.parametrize(("mutation", "id"), BY_CHECK, ids=[f"{m.name}-{id}" for m, id in BY_CHECK])
def test_the_check_fails(mutation: Mutation, id: str) -> None:
    with mutation.patch(), torch.random.fork_rng():
        result = verify_one(resolve(None), CHECKS[id], Settings(EXAMPLES, shrink=False))
    assert result.status == "failed", result
    assert result.failure is not None
    assert "the subject raised" not in result.failure.message


@pytest.mark.parametrize("mutation", [mutation for mutation in MUTATIONS if mutation.checks], ids=lambda m: m.name)
def test_some_check_names_the_bug(mutation: Mutation) -> None:
    slug = mutation.name.partition(":")[0]
    assert slug not in CAUSES or any(slug in CHECKS[id].causes for id in mutation.checks)


@pytest.mark.parametrize(("mutation", "test"), BY_TEST, ids=[f"{m.name}-{name_of(test)}" for m, test in BY_TEST])
def test_our_own_test_fails(mutation: Mutation, test: Callable[[], None]) -> None:
    expected = (AssertionError, pytest.fail.Exception, ValueError)
    brief = mock.patch.object(function_of(test), "_hypothesis_internal_use_settings", BRIEF, create=True)
    with brief, constants_from_no_module(), mutation.patch(), torch.random.fork_rng(), pytest.raises(expected):
        test()


@pytest.mark.parametrize("module", [test_cache, test_generate, test_loss, test_model, test_state])
def test_each_of_our_own_tests_on_random_models_can_fail(module: Any) -> None:
    random = {name for name, test in inspect.getmembers(module) if getattr(test, "is_hypothesis_test", False)}
    assert random <= {name_of(test) for _, test in BY_TEST}


def test_mutations_are_told_apart_by_their_names_and_each_is_seen() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert all(mutation.checks or mutation.tests for mutation in MUTATIONS)


def test_a_failure_shrinks_to_what_a_person_can_redo() -> None:
    """One layer, one head, one row of two tokens."""
    with MUTATIONS[0].patch():
        failure = verify_one(resolve(None), CHECKS["causality.edit"], Settings(EXAMPLES)).failure
    assert failure is not None
    assert (failure.config["num_layers"], failure.config["num_heads"], failure.values["tokens"]) == (1, 1, [[0, 0]])
