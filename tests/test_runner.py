"""How checks are run: what ends one, what it does to the others, and what the verdict is then."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.verify import Subject, SubjectError, check_causal_lm, timing
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.registry import Check
from diymodel.verify.report import Report
from diymodel.verify.runner import replay, run_check
from diymodel.verify.settings import Settings
from diymodel.verify.timing import OutOfTime, time_limit
from diymodel.verify.trial import Trial

SMALL = {"vocab_size": 9, "num_layers": 1, "hidden_size": 4, "num_heads": 1, "num_kv_heads": 1, "max_seq_len": 8}
ONLY = ["causality.edit", "shape.logits"]


def check(function: Callable[[Trial], None]) -> Check:
    return Check("area.name", "a property", "1.1", (), ("some-bug",), function)


def own(**changes: Any) -> Subject:
    return Subject(DIYForCausalLM, "own", **changes)


def misbehaving(act: Callable[[], object]) -> Subject:
    """Our model, which does something else when it gets 8 tokens, as no probing does."""

    class Misbehaving(DIYForCausalLM):
        def forward(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] == 8:
                act()
            return super().forward(input_ids, *args, **kwargs)

    return Subject(Misbehaving, "misbehaving")


def test_an_error_of_the_constructor_is_told_from_one_of_a_call() -> None:
    def needs_three_layers(config: DIYConfig) -> nn.Module:
        config.num_layers // (config.num_layers - 3)
        return DIYForCausalLM(config)

    result = run_check(Subject(needs_three_layers), check(lambda trial: (trial.model(), None)[1]), Settings())
    assert result.failure is not None, result
    assert result.failure.message == (
        "the subject raised ZeroDivisionError: integer division or modulo by zero; it was being built: "
        "what it cannot be built of, its factory refuses by NotImplementedError"
    )


def test_a_replay_that_does_not_apply_is_no_pass() -> None:
    def never(trial: Trial) -> None:
        raise NotApplicable("not this one")

    result = replay(own(), check(never), {})
    assert (result.status, result.reason) == ("skipped", "not this one")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "float46"}, r"this replay has dtype='float46': it must be one of float64, "),
        ({"dtype": ["x"]}, r"this replay has dtype=\['x'\]: "),
        ({"config": {"colour": 1}}, "colour"),
    ],
)
def test_a_replay_of_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(own(), check(lambda trial: (trial.model(), None)[1]), values)


def test_a_factory_builds_a_new_module_each_time() -> None:
    module = DIYForCausalLM(DIYConfig(vocab_size=16, max_seq_len=16))
    with pytest.raises(SubjectError, match=r"^kept returned the same module twice: build a new one in each call$"):
        check_causal_lm(Subject(lambda config: module, "kept"), only=["shape.logits"])


def test_a_difference_from_a_nan_is_no_number_in_json() -> None:
    def nowhere(trial: Trial) -> None:
        raise CheckFailure("must be equal, saw a NaN", max_abs_diff=math.inf, tolerance=1e-11)

    report = Report("nan", results=[run_check(own(), check(nowhere), Settings(1))])
    failure = json.loads(report.to_json(), parse_constant=pytest.fail)["checks"][0]["failure"]
    assert (failure["max_abs_diff"], failure["tolerance"]) == (None, 1e-11)


def test_a_trial_that_does_not_apply_hides_no_failure_in_another() -> None:
    def sometimes(trial: Trial) -> None:
        if not trial.draw("applies", st.booleans()):
            raise NotApplicable("not this one")
        raise CheckFailure("must hold, saw that it does not")

    assert run_check(own(), check(sometimes), Settings()).status == "failed"


def test_a_check_that_never_applies_is_skipped_after_a_few_trials() -> None:
    def never(trial: Trial) -> None:
        trial.draw("x", st.integers())
        raise NotApplicable("the module has no such thing")

    result = run_check(own(), check(never), Settings(examples=400))
    assert (result.status, result.reason) == ("skipped", "the module has no such thing")
    assert result.examples < 10


def test_an_exception_of_the_subject_is_a_failure_and_one_of_the_harness_an_error() -> None:
    def calls(trial: Trial) -> None:
        trial.model().logits(torch.tensor([[1.5]]))

    result = run_check(own(), check(calls), Settings())
    assert result.status == "failed"
    assert result.failure is not None
    assert "the subject raised ValueError: input_ids must be int64" in result.failure.message
    assert "check_input_ids" in str(result.failure.traceback)

    wrong = run_check(own(), check(functools.partial(Trial.tokens, lm=None)), Settings())  # type: ignore[arg-type]
    assert wrong.status == "error"
    assert "internal error of the check, please report it: AttributeError" in str(wrong.reason)


def test_shrinking_ends_after_a_while_with_the_smallest_failure_so_far() -> None:
    calls = 0

    def fails(trial: Trial) -> None:
        nonlocal calls
        calls += 1
        numbers = trial.draw("numbers", st.lists(st.integers(0, 10**6), min_size=40, max_size=40))
        if len(set(numbers)) > 30:
            raise CheckFailure(f"must be few, saw {len(set(numbers))}")

    result = run_check(own(), check(fails), Settings())
    assert result.status == "failed"
    assert calls < 500


def test_the_smallest_values_are_not_shrunk() -> None:
    def fails(trial: Trial) -> None:
        trial.values["calls"] = next(calls)
        trial.draw("numbers", st.lists(st.integers(0, 9), min_size=40, max_size=40))
        raise CheckFailure("must be nothing, saw something")

    calls = itertools.count(1)
    result = run_check(own(), check(fails), Settings())
    assert result.failure is not None
    assert result.failure.values == {"calls": 1, "numbers": [0] * 40}


def test_a_module_of_a_configuration_that_was_built_before_is_built_at_its_first_use() -> None:
    def factory(config: DIYConfig) -> nn.Module:
        built.append(torch.rand(()))
        return DIYForCausalLM(config)

    built: list[Tensor] = []
    values = {"config": SMALL, "weights": 0, "sharpness": 1}
    subject = Subject(factory)
    subject.convention  # noqa: B018
    built.clear()
    Trial.replaying(subject, values).model()
    later = Trial.replaying(subject, values).model()
    assert len(built) == 1
    torch.rand(3)
    assert later.module is later.module
    assert len(built) == 2
    assert built[0] == built[1]  # what a constructor draws does not depend on when it runs


def test_most_trials_are_of_configurations_of_their_own() -> None:
    """Hypothesis alone would draw every sixth anew, and put parts of it for others: 20 configurations in 40 trials."""
    seen: list[str] = []

    def configured(trial: Trial) -> None:
        trial.model()
        seen.append(json.dumps(trial.values["config"], sort_keys=True))

    result = run_check(own(), check(configured), Settings(examples=40))
    assert (result.status, result.examples, len(seen)) == ("passed", 40, 40)
    assert len(set(seen)) >= 25


def test_the_trials_of_a_profile_begin_with_those_of_a_smaller_one() -> None:
    seen: dict[int, list[str]] = {}
    for examples in (10, 40):
        noted = check(
            lambda trial, n=examples: seen.setdefault(n, []).append(repr((trial.model().config, trial.values)))
        )
        run_check(own(), noted, Settings(examples=examples, seed=3))
    assert seen[40][:10] == seen[10]
    assert len(seen[40]) == 40


def test_few_values_are_tried_once_each() -> None:
    seen: list[int] = []
    result = run_check(
        own(), check(lambda trial: seen.append(trial.draw("x", st.integers(0, 4)))), Settings(examples=40)
    )
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert result.status == "passed"


def test_time_runs_out_between_trials_without_a_verdict_being_lost() -> None:
    def slow(trial: Trial) -> None:
        trial.draw("x", st.integers())
        time.sleep(0.05)

    result = run_check(own(), check(slow), Settings(examples=400, check_seconds=0.3))
    assert result.status == "passed"
    assert 1 <= result.examples < 20
    assert result.reason is not None
    assert "of 400 trials: 0.3 s are over" in result.reason


def test_a_hanging_trial_is_an_error_of_that_check_alone() -> None:
    only = ["causality.edit", "causality.truncation"]
    report = check_causal_lm(misbehaving(lambda: time.sleep(60)), only=only, check_seconds=0.5)
    assert [result.status for result in report.results] == ["error", "error"]
    assert "no answer within 0.5 s" in str(report.results[0].reason)
    assert report.verdict == "failed"


def test_a_time_budget_leaves_out_the_rest_and_says_so() -> None:
    report = check_causal_lm(profile="quick", only=["shape.*", "causality.*"], time_budget=1e-9)
    assert not report.results
    assert report.verdict == "inconclusive", "nothing was seen"
    assert report.to_text().splitlines()[-1].startswith("inconclusive; 0.0 s; the time budget")
    assert report.interrupted == "the time budget of 1e-09 s ran out before a verdict on causality.each_backend"


def test_a_subject_that_refuses_every_drawn_configuration_is_told_so_with_its_own_words() -> None:
    def refusing(config: DIYConfig) -> DIYForCausalLM:
        if config.vocab_size != 16:  # as when the convention is found
            raise NotImplementedError(f"a vocabulary of {config.vocab_size}")
        return DIYForCausalLM(config)

    with pytest.raises(SubjectError, match=r"refusing refused every configuration .* the last: a vocabulary of"):
        check_causal_lm(refusing, profile="quick", only=ONLY)


def test_another_dtype_is_used_stated_and_replayed() -> None:
    report = check_causal_lm(profile="quick", only=ONLY, dtype="float32")
    assert (report.verdict, report.dtype) == ("passed", "float32")
    with pytest.raises(ValueError, match="dtype='float8': must be one of float64, float32"):
        check_causal_lm(dtype="float8")


def test_the_time_limit_lets_an_import_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an import of torch's compiler would break every later one."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.3)\nDONE = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def hang() -> None:
        while importlib.import_module("slow_to_import").DONE:
            pass

    with pytest.raises(OutOfTime), time_limit(0.05):
        hang()
    assert importlib.import_module("slow_to_import").DONE


def test_the_time_limit_does_not_wait_for_ever_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("while True: pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(timing, "_IMPORT_SECONDS", 0.2)
    with pytest.raises(OutOfTime), time_limit(0.05):
        importlib.import_module("never_imported")


def test_the_time_limit_leaves_no_timer_behind() -> None:
    with pytest.raises(OutOfTime), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # an alarm left over would end the test run here


def test_the_global_random_state_is_as_before() -> None:
    before = torch.get_rng_state()
    check_causal_lm(profile="quick", only=ONLY)
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_run_on_one_thread_and_the_callers_have_theirs_afterwards() -> None:
    threads = []

    class Notes(DIYForCausalLM):
        def forward(self, input_ids: Any) -> Any:
            threads.append(torch.get_num_threads())
            return super().forward(input_ids) + torch.rand(())  # which fails, and is looked into

    torch.set_num_threads(2)
    try:
        assert check_causal_lm(Notes, profile="quick", only=["forward.deterministic"]).symptoms
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(threads) == {1}


def differing(largest: Callable[[int], float]) -> Check:
    """A check that fails by a size, of a tolerance of 1, that depends on what is drawn."""

    def fails(trial: Trial) -> None:
        difference = largest(trial.draw("x", st.integers(0, 100)))
        if difference > 1:
            raise CheckFailure(f"must be equal, saw {difference}", difference, 1.0)

    return check(fails)


@pytest.mark.parametrize(
    ("largest", "seen"),
    [
        (lambda x: 50.0 if x > 60 else 2.0 if x > 3 else 0.0, {"x": 61}),  # smaller ones are near rounding
        (lambda x: 2.0 if x > 3 else 0.0, {"x": 4}),  # there is no other
    ],
    ids=["some are far from rounding", "all are near"],
)
def test_a_failure_is_made_no_smaller_than_what_convinces(
    largest: Callable[[int], float], seen: dict[str, int]
) -> None:
    result = run_check(own(), differing(largest), Settings())
    assert result.failure is not None
    assert result.failure.values == seen


def test_a_doubtful_failure_is_not_lost_where_time_runs_out_or_the_rest_does_not_apply() -> None:
    def slow(trial: Trial) -> None:
        if trial.draw("x", st.integers(0, 100)) != 0:
            raise NotApplicable("only for nothing")
        time.sleep(0.2)
        raise CheckFailure("must be equal, saw 2", 2.0, 1.0)

    result = run_check(own(), check(slow), Settings(check_seconds=0.3))
    assert (result.status, result.reason) == ("failed", None)


def test_a_doubtful_failure_replays() -> None:
    found = run_check(own(), differing(lambda x: 2.0), Settings())
    assert found.failure is not None
    again = replay(own(), differing(lambda x: 2.0), found.failure.values)
    assert again.failure is not None
    assert again.failure.message == found.failure.message


@pytest.mark.parametrize(("dtype", "status"), [("float64", "failed"), ("float32", "inconclusive")])
def test_what_is_never_clearly_beyond_rounding_is_no_failure_in_a_narrow_type(dtype: str, status: str) -> None:
    result = run_check(own(), differing(lambda x: 2.0), Settings.of(dtype=dtype))
    assert result.status == status
    assert (result.reason is None) == (status == "failed")
    assert result.examples == 40 or status == "failed"
    clear = run_check(own(), differing(lambda x: 50.0 if x > 60 else 2.0), Settings.of(dtype=dtype))
    assert clear.status == "failed"


def test_what_is_imported_besides_changes_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[int]:
        numbers: list[int] = []
        run_check(own(), check(lambda trial: numbers.append(trial.draw("n", st.integers(0, 10**9)))), Settings(200))
        return numbers

    before = drawn()
    (tmp_path / "constants_of_mine.py").write_text(f"NUMBERS = {[10**6 + i for i in range(500)]}\n")
    monkeypatch.syspath_prepend(tmp_path)  # hypothesis calls local what lies outside of site-packages
    importlib.import_module("constants_of_mine")
    assert drawn() == before
