"""The three ways to run checks on a subject: all of them for a report, one for its verdict, and one trial again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diymodel.config import DIYConfig
from diymodel.verify.check_run import CheckRun, run_here
from diymodel.verify.child import can_fork
from diymodel.verify.examination import diagnose
from diymodel.verify.failure import SubjectError
from diymodel.verify.isolation import probe_isolated, run_alone, run_isolated
from diymodel.verify.options import CHECK_SECONDS
from diymodel.verify.registry import Check, nearest, select_checks
from diymodel.verify.report import Report, Result
from diymodel.verify.settings import Settings, check_device, check_time
from diymodel.verify.subject import Factory, Subject, resolve
from diymodel.verify.surroundings import surroundings
from diymodel.verify.trial import Trial, dtype_name


@surroundings()
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
    dtype: str | None = None,
    time_budget: float | None = None,
    check_seconds: float = CHECK_SECONDS,
    isolate: bool = False,
    jobs: int = 1,
    on_result: Callable[[Result], object] | None = None,
) -> Report:
    """Verify a causal language model.

    Args:
        subject: ``"path/to/file.py:Name"``, ``"package.module:Name"``, a factory ``config -> nn.Module`` (a class will
            do), a :class:`Subject`, or None for diymodel's own model.
        profile: "quick", "standard" or "thorough": 10, 40 or 200 trials a check.
        seed: the same seed gives the same report.
        only: globs of check ids to run; none means all but the optional ones.
        skip: globs of check ids to leave out.
        step: a step of the roadmap, "3" or "3.2"; None means all.
        expected_failures: ``{id: reason}``; such a check is run, and its failure does not count. That it passes is
            said in its place.
        device: where the modules are built.
        dtype: of the modules: "float64", "float32", "bfloat16" or "float16". None: float64, in which rounding and bugs
            are worlds apart, or float32 where the subject refuses it.
        time_budget: seconds for all checks together; what is not done by then is left out, and the report says so.
        check_seconds: seconds after which a check begins no further trial; a single trial that takes as long is an
            error of that check, and the others go on.
        isolate: run the checks in child processes, so that the others go on even if one crashes or hangs in native
            code. It needs fork, and a process that has not yet called backward or initialised CUDA; elsewhere they run
            in this one.
        jobs: how many children run checks side by side; without ``isolate`` there are none.
        on_result: called after each check, as soon as it is done.

    Raises:
        SubjectError: the subject cannot be found, built or called.
        ValueError: an id, step, profile, dtype or device is unknown, no check is left, check_seconds or
            time_budget is no time, or jobs is not above 0.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be above 0: it is how many checks run side by side")
    if time_budget is not None:
        check_time("time_budget", time_budget)
    deadline = None if time_budget is None else time.monotonic() + time_budget
    only = tuple(only)
    settings = Settings.of(profile, seed, device, dtype, check_seconds, deadline, optional=bool(only))
    expected_failures = dict(expected_failures or {})
    chosen = select_checks(only, skip, step)
    for id in expected_failures:
        if not any(check.id == id for check in chosen):
            raise ValueError(f"{id!r} is expected to fail, and no check that runs is called so{nearest(id, chosen)}")
    isolate = isolate and can_fork()
    resolved = resolve(subject)
    if isolate:
        probe_isolated(resolved)
    convention = resolved.convention  # found first, so that a subject that cannot be called says so at once
    dtype_used = dtype_name(settings.dtype or convention.dtype)
    called, left_out = resolved.describe(), tuple(resolved.left_out)
    report = Report(
        resolved.name, seed, profile, torch.__version__, device, dtype_used, called=called, left_out=left_out
    )
    started = time.perf_counter()
    if isolate:
        results = run_isolated(resolved, chosen, settings, jobs, verify_one)
    else:
        results = run_checks(resolved, chosen, settings)
    _gather(report, (_as_expected(result, expected_failures) for result in results), chosen, time_budget, on_result)
    if resolved.refusal and report.results and not any(result.examples for result in report.results):
        raise SubjectError(f"{resolved.name} refused every configuration that was drawn, the last: {resolved.refusal}")
    if report.failed:
        diagnose(report, resolved, isolate)
    report.seconds = time.perf_counter() - started
    report.refused = tuple(sorted(resolved.refused))
    return report


def _as_expected(result: Result, expected_failures: Mapping[str, str]) -> Result:
    """The verdict as it counts for somebody who expected some checks to fail."""
    if (why := expected_failures.get(result.check.id)) is None:
        return result
    if result.status in ("failed", "error"):
        return replace(result, status="expected_failure", reason=why)
    return replace(result, reason=f"it was expected to fail: {why}") if result.status == "passed" else result


def _gather(
    report: Report,
    results: Iterable[Result],
    chosen: Sequence[Check],
    time_budget: float | None,
    on_result: Callable[[Result], object] | None,
) -> None:
    """Put the verdicts into the report, in the order of the checks, and say where it ends before the last."""
    found: dict[str, Result] = {}  # in any order, where they ran side by side
    try:
        for result in results:
            found[result.check.id] = result
            if on_result is not None:
                on_result(result)
        if len(found) < len(chosen):
            report.interrupted = f"the time budget of {time_budget:g} s ran out"
    except KeyboardInterrupt:
        report.interrupted, report.cancelled = "interrupted", True
    report.results = [found[check.id] for check in chosen if check.id in found]
    if report.interrupted:
        first = next(check.id for check in chosen if check.id not in found)
        report.interrupted += f" before a verdict on {first}"


def run_checks(subject: Subject, checks: Sequence[Check], settings: Settings) -> Iterator[Result]:
    """The verdicts one after the other, as long as there is time."""
    for check in checks:
        if (own := settings.in_time()) is None:
            return
        yield verify_one(subject, check, own)


@surroundings()
def replay(
    subject: str | Subject | Factory | None, check: Check, values: Mapping[str, Any], device: str = "cpu"
) -> Result:
    """Run one check once on recorded values.

    Raises:
        SubjectError: the subject cannot be found, built or called.
        ValueError: the values are not those of this check, or there is no such device.
    """
    check_device(device)
    if "config" in values:
        DIYConfig.from_dict(values["config"])  # whose error would else be taken for the subject's
    resolved = resolve(subject)
    trial = Trial.replaying(resolved, values, device)
    run = CheckRun(resolved, check, Settings(1, dtype=trial.dtype))
    result = run.judged(lambda: run.only(trial))
    if trial.unknown:
        raise ValueError(f"this replay has no value {trial.unknown!r}: it belongs to another check or version")
    return result


@surroundings()
def verify_one(subject: Subject, check: Check, settings: Settings) -> Result:
    """The verdict of one check: skipped where the subject lacks what it needs, else run."""
    reason = next((why for need in check.needs if (why := subject.missing(need))), None)
    if check.optional and not settings.optional:
        reason = "optional: it runs where it is named (--only, in pytest -k)"
    if reason is not None:
        return Result(check, "skipped", reason=reason)
    return run_check(subject, check, settings)


def run_check(subject: Subject, check: Check, settings: Settings) -> Result:
    """Draw trials until one fails, or enough have passed; a failing one is shrunk.

    Optional checks run in a process of their own: a compilation that fails can leave torch unusable.
    """
    return (run_alone if check.optional and can_fork() else run_here)(subject, check, settings)
