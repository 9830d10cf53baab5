"""Runs checks on a subject: draws trials, shrinks the failing ones, and turns every outcome into a verdict."""

from __future__ import annotations

import json
import shlex
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.errors import StopTest, Unsatisfiable, UnsatisfiedAssumption

from diymodel.verify.examination import diagnose
from diymodel.verify.failure import HARNESS, CheckFailure, Inconclusive, NotApplicable, SubjectError, is_a_tools
from diymodel.verify.randomness import constants_from_no_module
from diymodel.verify.registry import Check, nearest, select_checks
from diymodel.verify.report import Failure, Report, Result, Status
from diymodel.verify.subject import Factory, Subject, resolve
from diymodel.verify.timing import OutOfTime, time_limit
from diymodel.verify.tolerance import rounding
from diymodel.verify.trial import DTYPES, Trial

PROFILES = {"quick": 10, "standard": 40, "thorough": 400}  # trials a check
CHECK_SECONDS = 60.0  # after which a check begins no further trial, and a single trial is taken for hung
_NOT_APPLICABLE = 5  # trials that all do not apply, before a check is skipped
_OPTIONAL_SHARE = 10  # a trial of an optional check takes seconds: one for so many of others, and none to shrink it
_CONVINCING = 10  # times the tolerance: a smaller difference might be rounding that was measured too small
_SHRINKS = 400  # trials spent on making a failure smaller
_INTO_SUBJECT = ("_call", "build")  # functions of the harness that run the subject's code


@dataclass(frozen=True)
class Settings:
    """How a check is run."""

    examples: int = PROFILES["standard"]  # trials
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None  # None: the subject's own
    check_seconds: float = CHECK_SECONDS
    deadline: float | None = None  # of time.monotonic(), for all checks together
    shrink: bool = True  # make failures as small as they can be
    optional: bool = True  # run checks that are optional as well

    @classmethod
    def of(
        cls,
        profile: str = "standard",
        seed: int = 0,
        device: str = "cpu",
        dtype: str | None = None,
        check_seconds: float = CHECK_SECONDS,
        deadline: float | None = None,
        optional: bool = False,
    ) -> Settings:
        """From what users write; the arguments are those of :func:`check_causal_lm`.

        Raises:
            ValueError: there is no such profile, dtype or device, or check_seconds is no time.
        """
        if not check_seconds > 0:
            raise ValueError(f"check_seconds={check_seconds:g} must be above 0")
        _check_device(device)
        if profile not in PROFILES:
            raise ValueError(f"profile={profile!r}: must be one of {', '.join(PROFILES)}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        own_dtype = DTYPES[dtype] if dtype else None
        return cls(PROFILES[profile], seed, device, own_dtype, check_seconds, deadline, optional=optional)


def _check_device(name: str) -> None:
    """Refuse what is no device of this torch. CUDA itself is left to the child that runs the checks."""
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: {str(error).splitlines()[0]}") from None
    if kind == "cuda" and not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ValueError(f"device={name!r}: this torch, {torch.__version__}, was built without CUDA")


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
    on_result: Callable[[Result], object] | None = None,
) -> Report:
    """Verify a causal language model.

    Args:
        subject: ``"path/to/file.py:Name"``, ``"package.module:Name"``, a factory ``config -> nn.Module`` (a class will
            do), a :class:`Subject`, or None for diymodel's own model.
        profile: "quick", "standard" or "thorough": 10, 40 or 400 trials a check.
        seed: the same seed gives the same report.
        only: globs of check ids to run; none means all but the optional ones.
        skip: globs of check ids to leave out.
        step: a step of the roadmap, "3" or "3.2"; None means all.
        expected_failures: ``{id: reason}``; such a check is run, and its failure does not count.
        device: where the modules are built.
        dtype: of the modules: "float64", "float32", "bfloat16" or "float16". None: float64, in which rounding and bugs
            are worlds apart, or float32 where the subject refuses it.
        time_budget: seconds for all checks together; what is not done by then is left out, and the report says so.
        check_seconds: seconds after which a check begins no further trial; a single trial that takes as long is an
            error of that check, and the others go on.
        isolate: run the checks in a child process, so that the others go on even if one crashes or hangs in native
            code. It needs fork, and a process that has not yet called backward or initialised CUDA.
        on_result: called after each check.

    Raises:
        SubjectError: the subject cannot be found, built or called.
        ValueError: an id, step, profile, dtype or device is unknown, no check is left, or check_seconds is not above 0.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget
    only = tuple(only)
    settings = Settings.of(profile, seed, device, dtype, check_seconds, deadline, optional=bool(only))
    expected_failures = dict(expected_failures or {})
    chosen = select_checks(only, skip, step)
    for id in expected_failures:
        if not any(check.id == id for check in chosen):
            raise ValueError(f"expected_failures names no check that runs: {id!r}{nearest(id, chosen)}")
    from diymodel.verify.isolation import can_isolate, probe_isolated

    isolate = isolate and can_isolate()
    resolved = resolve(subject)
    if isolate:
        probe_isolated(resolved)
    convention = resolved.convention  # found first, so that a subject that cannot be called says so at once
    dtype_name = _name(settings.dtype or convention.dtype)
    report = Report(resolved.name, seed, profile, torch.__version__, device, dtype_name, called=resolved.describe())
    started = time.perf_counter()
    try:
        for result in _runner(isolate)(resolved, chosen, settings):
            if result.status in ("failed", "error") and result.check.id in expected_failures:
                result = replace(result, status="expected_failure", reason=expected_failures[result.check.id])
            report.results.append(result)
            if on_result is not None:
                on_result(result)
        if len(report.results) < len(chosen):
            report.interrupted = f"the time budget of {time_budget:g} s ran out"
    except KeyboardInterrupt:
        report.interrupted, report.cancelled = "interrupted", True
    if report.interrupted:
        report.interrupted += f" before a verdict on {chosen[len(report.results)].id}"
    if resolved.refusal and report.results and not any(result.examples for result in report.results):
        raise SubjectError(f"{resolved.name} refused every configuration that was drawn, the last: {resolved.refusal}")
    if report.failed:
        diagnose(report, resolved, isolate)
    report.seconds = time.perf_counter() - started
    report.refused = tuple(sorted(resolved.refused))
    return report


def _runner(isolate: bool) -> Callable[[Subject, Sequence[Check], Settings], Iterator[Result]]:
    from diymodel.verify.isolation import run_isolated

    return run_isolated if isolate else run_checks


def run_checks(subject: Subject, checks: Sequence[Check], settings: Settings) -> Iterator[Result]:
    """The verdicts one after the other, as long as there is time."""
    for check in checks:
        if settings.deadline is not None:
            left = settings.deadline - time.monotonic()
            if left <= 0:
                return
            settings = replace(settings, check_seconds=min(settings.check_seconds, left))
        yield verify_one(subject, check, settings)


def replay(
    subject: str | Subject | Factory | None, check: Check, values: Mapping[str, Any], device: str = "cpu"
) -> Result:
    """Run one check once on recorded values.

    Raises:
        SubjectError: the subject cannot be found, built or called.
        ValueError: the values are not those of this check, or there is no such device.
    """
    _check_device(device)
    resolved = resolve(subject)
    trial = Trial.replaying(resolved, values, device)
    run = _Run(resolved, check, Settings(1, dtype=trial.dtype))
    result = run.judged(lambda: run.only(trial))
    if trial.unknown:
        raise ValueError(f"this replay has no value {trial.unknown!r}: it belongs to another check or version")
    return result


def verify_one(subject: Subject, check: Check, settings: Settings) -> Result:
    """The verdict of one check: skipped where the subject lacks what it needs, else run."""
    reason = next((why for need in check.needs if (why := subject.missing(need))), None)
    if check.optional and not settings.optional:
        reason = "optional: name it with --only"
    if reason is not None:
        return Result(check, "skipped", reason=reason)
    return run_check(subject, check, settings)


def run_check(subject: Subject, check: Check, settings: Settings) -> Result:
    """Draw trials until one fails, or enough have passed; a failing one is shrunk.

    Optional checks run in a process of their own: a compilation that fails can leave torch unusable.
    """
    from diymodel.verify.isolation import can_isolate, run_alone

    return (run_alone if check.optional and can_isolate() else run_here)(subject, check, settings)


def run_here(subject: Subject, check: Check, settings: Settings) -> Result:
    """:func:`run_check` in this process."""
    run = _Run(subject, check, settings)
    return run.judged(run.trials)


class _Enough(BaseException):
    """No further trial is needed. Hypothesis lets through what is no Exception, and does not try to shrink it."""


class _Run:
    """The trials of one check on one subject, and what is known of them so far."""

    def __init__(self, subject: Subject, check: Check, settings: Settings) -> None:
        self.subject = subject
        self.check = check
        self.settings = settings
        self.examples = max(1, settings.examples // _OPTIONAL_SHARE) if check.optional else settings.examples
        self.shrinking = settings.shrink and not check.optional
        self.started = time.perf_counter()
        self.count = 0
        self.not_applicable: list[str] = []  # the reason of every trial that did not apply
        self.effects: list[float] = []
        self.failed: tuple[Trial, Exception] | None = None  # the last, which is the smallest
        self.convincing_only = True  # for as long as there may be such a failure, a doubtful one is passed over
        self.doubtful: tuple[Trial, Exception] | None = None  # a failure so near rounding that it may be taken for it
        self.drawn = 0  # trials that Hypothesis began; the first is of the smallest values that there are
        self.smallest = False  # whether those failed
        self.shrinks = 0
        self.out_of_time = False
        self.never_applies = False

    def trials(self) -> None:
        """All of them, and once more, to make it smaller, where the only failure is a doubtful one."""
        self._all_trials()
        if self.doubtful is not None and not self.may_be_rounding:
            self.convincing_only, self.count, self.drawn = False, 0, 0
            self._all_trials()
        if self.not_applicable and len(self.not_applicable) == self.count:
            raise NotApplicable(self.not_applicable[0])
        if self.effects and max(self.effects) <= rounding(torch.float64):
            raise Inconclusive(
                f"in {self.count} trials, what a bug would change never changed by more than {max(self.effects):.1g} "
                "of its size"
            )

    def _all_trials(self) -> None:
        draw = hypothesis.given(st.data())(self._draw)
        draw = hypothesis.settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if self.shrinking else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
        )(draw)
        with constants_from_no_module():
            hypothesis.seed(self.settings.seed)(draw)()

    def _draw(self, data: st.DataObject) -> None:
        self.drawn += 1
        self.shrinks += self.failed is not None
        patience = self.settings.check_seconds * (2 if self.shrinks else 1)  # a failure at the end is shrunk as well
        self.out_of_time = time.perf_counter() - self.started > patience
        if self.out_of_time or self.shrinks > _SHRINKS or self.smallest:
            raise _Enough
        dtype = self.settings.dtype or self.subject.convention.dtype_for(self.check.needs)
        self.trial(Trial(self.subject, data.draw, dtype=dtype, device=self.settings.device))

    def trial(self, trial: Trial) -> None:
        """One, with the global random state and gradient mode as they were afterwards."""
        self.count += 1
        try:
            with time_limit(self.settings.check_seconds):
                trial.run(self.check.function)
        except (UnsatisfiedAssumption, StopTest):  # the subject refused the configuration, or Hypothesis the draw
            self.count -= 1
            raise
        except NotApplicable as stop:
            self.not_applicable.append(str(stop))
            self.never_applies = len(self.not_applicable) == self.count >= _NOT_APPLICABLE
            if self.never_applies:
                raise _Enough from None
            return
        except Exception as error:
            if self.convincing_only and _is_near_rounding(error):
                self.doubtful = trial, error
                return
            if isinstance(error, CheckFailure) or _is_the_subjects(error):
                self.smallest = self.drawn == 1
                self.failed = trial, error
            raise
        if trial.seen_difference is not None:
            self.effects.append(trial.seen_difference)

    def only(self, trial: Trial) -> None:
        """One trial and no other, which may not apply."""
        self.trial(trial)
        if self.not_applicable:
            raise NotApplicable(self.not_applicable[0])

    def judged(self, run: Callable[[], object]) -> Result:
        """Call ``run`` and name what came of it."""
        status: Status = "passed"
        reason = failure = None
        try:
            run()
        except OutOfTime:
            status, reason = "error", f"no answer within {self.limit}, in trial {self.count}: it hangs, or is too slow"
        except SystemExit as left:
            status, reason = "error", f"the subject left Python with exit code {left.code}"
        except NotApplicable as stop:
            status, reason = "skipped", str(stop)
        except Inconclusive as stop:
            status, reason = "inconclusive", str(stop)
        except Unsatisfiable:
            status, reason = "skipped", f"the subject refuses every configuration that it needs: {self.subject.refusal}"
        except (Exception, _Enough) as raised:  # Hypothesis takes an early end for flakiness
            if self.out_of_time:
                status, reason = self._verdict_so_far()
            elif self.never_applies:
                status, reason = "skipped", self.not_applicable[0]
            elif self.failed is None:
                status, reason = "error", f"the check itself failed: {type(raised).__name__}: {raised}"
        if self.may_be_rounding:
            status, reason = "inconclusive", f"it may be rounding: {self.doubtful[1]}"  # type: ignore[index]
        elif (failed := self.failed or self.doubtful) is not None:
            status, reason = "failed", None
            failure = _failure(self.check, self.subject, *failed)
        return Result(self.check, status, self.count, time.perf_counter() - self.started, reason, failure)

    def _verdict_so_far(self) -> tuple[Status, str]:
        if not self.count:
            return "inconclusive", "there was no time for a trial"
        return "passed", f"stopped after {self.count} of {self.examples} trials: {self.limit} are over"

    @property
    def may_be_rounding(self) -> bool:
        """Whether all that failed is doubtful, in a narrow type.

        There, now and then, rounding is many times what was measured, and no bug is so small in every trial.
        """
        return self.failed is None and self.doubtful is not None and self.doubtful[0].dtype != torch.float64

    @property
    def limit(self) -> str:
        return f"{self.settings.check_seconds:g} s"


def _is_near_rounding(error: Exception) -> bool:
    """Whether a difference is so near its tolerance that a reader could take it for rounding."""
    if not isinstance(error, CheckFailure) or error.max_abs_diff is None or error.tolerance is None:
        return False
    return error.max_abs_diff < _CONVINCING * error.tolerance


def _failure(check: Check, subject: Subject, trial: Trial, error: Exception) -> Failure:
    values = trial.values
    if trial.dtype != subject.convention.dtype:
        values = {**values, "dtype": _name(trial.dtype)}
    recorded = json.dumps(values, separators=(",", ":"))
    device = "" if trial.device == "cpu" else f" --device {trial.device}"
    command = f"diymodel verify {shlex.quote(subject.name)} --only {check.id}{device} --replay {shlex.quote(recorded)}"
    if isinstance(error, CheckFailure):
        return Failure(
            error.message, check.causes, values.get("config", {}), values, command, error.max_abs_diff, error.tolerance
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_a_tools(frame)]
    message = f"the subject raised {type(error).__name__}: {error}"
    if any(frame.name == Subject.made.__name__ and HARNESS in frame.filename for frame in frames):
        message += "; it was being built: what it cannot be built of, its factory refuses by NotImplementedError"
    return Failure(
        message, (), values.get("config", {}), values, command, traceback="".join(traceback.format_list(own)).rstrip()
    )


def _is_the_subjects(error: Exception) -> bool:
    """Whether an error came out of the subject, and not of the harness around it."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(not is_a_tools(frame) or (frame.name in _INTO_SUBJECT and HARNESS in frame.filename) for frame in frames)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
