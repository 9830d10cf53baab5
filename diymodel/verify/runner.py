"""Runs checks on a subject: draws trials, shrinks the failing ones, and turns every outcome into a verdict."""

from __future__ import annotations

import json
import shlex
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from diymodel.verify.failure import CheckFailure, Inconclusive, NotApplicable
from diymodel.verify.registry import Check, nearest, select_checks
from diymodel.verify.report import Failure, Report, Result
from diymodel.verify.subject import Factory, Subject, resolve
from diymodel.verify.tolerance import ROUNDING
from diymodel.verify.trial import Trial

PROFILES = {"quick": 10, "standard": 40, "thorough": 400}  # trials a check


def check_causal_lm(
    subject: str | Subject | Factory | None = None,
    *,
    profile: str = "standard",
    seed: int = 0,
    only: Iterable[str] = (),
    skip: Iterable[str] = (),
    step: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    device: str = "cpu",
    time_budget: float | None = None,
    on_result: Callable[[Result], object] | None = None,
) -> Report:
    """Verify a causal language model.

    Args:
        subject: ``"path/to/file.py:Name"``, ``"package.module:Name"``, a factory ``config -> nn.Module`` (a class will
            do), a :class:`Subject`, or None for diymodel's own model.
        profile: "quick", "standard" or "thorough": 10, 40 or 400 trials a check.
        seed: the same seed gives the same report.
        only: globs of check ids to run; none means all.
        skip: globs of check ids to leave out.
        step: a step of the roadmap, "3" or "3.2"; None means all.
        expected_failures: ``{id: reason}``; such a check is run, and its failure does not count.
        device: where the modules are built.
        time_budget: seconds after which no further check is begun.
        on_result: called after each check.

    Raises:
        SubjectError: the subject cannot be found, built or called.
        ValueError: an id, step or profile is unknown.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: must be one of {', '.join(PROFILES)}")
    expected_failures = dict(expected_failures or {})
    chosen = select_checks(only, skip, step)
    for id in expected_failures:
        if not any(check.id == id for check in chosen):
            raise ValueError(f"expected_failures names no check that runs: {id!r}{nearest(id, chosen)}")
    resolved = resolve(subject)
    _ = resolved.convention  # found before the first check, so that a subject that cannot be called says so at once
    report = Report(resolved.name, seed, profile, torch.__version__, device, "float64")
    started = time.perf_counter()
    for result in _results(resolved, chosen, profile, seed, device, expected_failures, time_budget, report):
        report.results.append(result)
        if on_result is not None:
            on_result(result)
    report.results = _rank_causes(report.results)
    report.seconds = time.perf_counter() - started
    report.refused = tuple(sorted(resolved.refused))
    return report


def _rank_causes(results: list[Result]) -> list[Result]:
    """Put the causes that many failed checks name first in each failure, and those that passed checks name last."""
    votes: Counter[str] = Counter()
    for result in results:
        weight = {"failed": 1, "passed": -1}.get(result.status, 0)
        votes.update(dict.fromkeys(result.check.causes, weight))

    def ranked(result: Result) -> Result:
        if result.failure is None:
            return result
        causes = tuple(sorted(result.failure.likely_causes, key=lambda cause: -votes[cause]))
        return replace(result, failure=replace(result.failure, likely_causes=causes))

    return [ranked(result) for result in results]


def replay(subject: str | Subject | Factory | None, check: Check, values: Mapping[str, Any]) -> Result:
    """Run one check once on recorded values."""
    resolved = resolve(subject)
    trial = Trial(resolved, None, values)
    return _judge(check, lambda: _run_trial(check, trial), lambda: (1, trial), resolved)


def _results(
    subject: Subject,
    checks: Iterable[Check],
    profile: str,
    seed: int,
    device: str,
    expected_failures: Mapping[str, str],
    time_budget: float | None,
    report: Report,
) -> Iterator[Result]:
    started = time.perf_counter()
    for check in checks:
        if time_budget is not None and time.perf_counter() - started > time_budget:
            report.interrupted = f"the time budget of {time_budget:g} s ran out before {check.id}"
            return
        try:
            result = verify_one(subject, check, profile, seed, device)
        except KeyboardInterrupt:
            report.interrupted = f"interrupted in {check.id}"
            return
        if result.status in ("failed", "error") and check.id in expected_failures:
            result = Result(
                check, "expected_failure", result.examples, result.seconds, expected_failures[check.id], result.failure
            )
        yield result


def verify_one(subject: Subject, check: Check, profile: str, seed: int, device: str = "cpu") -> Result:
    """The verdict of one check: skipped where the subject lacks what it needs, else run at the profile."""
    reason = next((why for need in check.needs if (why := subject.missing(need))), None)
    if reason is not None:
        return Result(check, "skipped", reason=reason)
    return run_check(subject, check, PROFILES[profile], seed, device)


def run_check(subject: Subject, check: Check, examples: int, seed_: int, device: str = "cpu") -> Result:
    """Draw trials until one fails, or ``examples`` have passed; a failing one is shrunk."""
    last: list[Trial] = []
    count = 0
    effects: list[float] = []

    @seed(seed_)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(st.data())
    def trials(data: st.DataObject) -> None:
        nonlocal count
        trial = Trial(subject, data.draw, device=device)
        last[:] = [trial]
        count += 1
        _run_trial(check, trial)
        if trial.seen_difference is not None:
            effects.append(trial.seen_difference)

    def run() -> None:
        trials()
        if effects and max(effects) <= ROUNDING:
            raise Inconclusive(
                f"in {count} trials, what a bug would change never changed by more than {max(effects):.1g} of its size"
            )

    return _judge(check, run, lambda: (count, last[0] if last else None), subject)


def _run_trial(check: Check, trial: Trial) -> None:
    """One trial, with the global random state and gradient mode as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        check.function(trial)


def _judge(
    check: Check, run: Callable[[], object], after: Callable[[], tuple[int, Trial | None]], subject: Subject
) -> Result:
    """Call ``run`` and name what came of it; ``after`` then tells the trials made and the last of them."""
    started = time.perf_counter()
    status, reason, error = "passed", None, None
    try:
        run()
    except NotApplicable as stop:
        status, reason = "skipped", str(stop)
    except (Inconclusive, Unsatisfiable) as stop:
        status, reason = "inconclusive", str(stop)
    except Exception as raised:  # a failed check, or whatever a stranger's module raises
        status, error = "failed", raised
    examples, trial = after()
    failure = None if error is None else _failure(check, error, trial, subject)
    return Result(check, status, examples, time.perf_counter() - started, reason, failure)  # type: ignore[arg-type]


def _failure(check: Check, error: Exception, trial: Trial | None, subject: Subject) -> Failure:
    values = trial.values if trial is not None else {}
    recorded = json.dumps(values, separators=(",", ":"))
    command = f"diymodel verify {shlex.quote(subject.name)} --only {check.id} --replay {shlex.quote(recorded)}"
    if isinstance(error, CheckFailure):
        return Failure(
            error.message, check.causes, values.get("config", {}), values, command, error.max_abs_diff, error.tolerance
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "diymodel/verify" not in frame.filename]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    message = f"the subject raised {type(error).__name__}: {error}"
    return Failure(
        message, (), values.get("config", {}), values, command, traceback="".join(traceback.format_list(own)).rstrip()
    )
