"""One check on one subject: draws trials, shrinks a failing one, and turns the outcome into a verdict."""

from __future__ import annotations

import json
import shlex
import time
import traceback
from collections import Counter
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.errors import StopTest, Unsatisfiable, UnsatisfiedAssumption

from diymodel.verify.failure import (
    HARNESS,
    CheckFailure,
    Inconclusive,
    NotApplicable,
    is_a_tools,
    said_where,
    says_not_implemented,
)
from diymodel.verify.overwritten import OVERWRITTEN, says_overwritten, written_by
from diymodel.verify.randomness import constants_from_no_module
from diymodel.verify.registry import Check
from diymodel.verify.report import Failure, Result, Status
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject
from diymodel.verify.timing import OutOfTime, time_limit
from diymodel.verify.tolerance import rounding
from diymodel.verify.trial import MAX_ROWS, Trial, dtype_name

_NOT_APPLICABLE = 5  # trials that all do not apply, before a check is skipped
_OPTIONAL_SHARE = 10  # a trial of an optional check takes seconds: one for so many of others, and none to shrink it
_AT_ONCE = 10  # trials that Hypothesis draws anew; beyond, five of six are one before with a part put for another
_SEEDS = 2**40  # more than anybody counts up to
_CONVINCING = 10  # times the tolerance: a smaller difference might be rounding that was measured too small
_SHRINKS = 400  # trials spent on making a failure smaller
_INTO_SUBJECT = ("_call", "build")  # functions of the harness that run the subject's code


def run_here(subject: Subject, check: Check, settings: Settings) -> Result:
    """Draw trials in this process until one fails, or enough have passed; a failing one is shrunk."""
    run = CheckRun(subject, check, settings)
    return run.judged(run.trials)


class _Enough(BaseException):
    """No further trial is needed. Hypothesis lets through what is no Exception, and does not try to shrink it."""


class CheckRun:
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
            raise NotApplicable(self.why_not)
        if self.effects and max(self.effects) <= rounding(torch.float64):
            raise Inconclusive(
                f"in {self.count} trials, what a bug would change never changed by more than {max(self.effects):.1g} "
                "of its size"
            )

    def _all_trials(self) -> None:
        """Ten at a time, from seeds that no other run begins with; each ten begin with the smallest values."""
        for start in range(0, self.examples, _AT_ONCE):
            before, wanted = self.count, min(_AT_ONCE, self.examples - start)
            self._some_trials(wanted, self.settings.seed + start * _SEEDS)
            if self.count < before + wanted:  # there are no others, or the subject refuses nearly all
                break

    def _some_trials(self, wanted: int, seed: int) -> None:
        self.drawn = 0
        draw = hypothesis.given(st.data())(self._draw)
        draw = hypothesis.settings(
            max_examples=wanted,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink) if self.shrinking else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
        )(draw)
        with constants_from_no_module():
            hypothesis.seed(seed)(draw)()

    def _draw(self, data: st.DataObject) -> None:
        self.drawn += 1
        self.shrinks += self.failed is not None
        patience = self.settings.check_seconds * (2 if self.shrinks else 1)  # a failure at the end is shrunk as well
        self.out_of_time = time.perf_counter() - self.started > patience
        if self.out_of_time or self.shrinks > _SHRINKS or self.smallest:
            raise _Enough
        dtype = self.settings.dtype or self.subject.convention.dtype_for(self.check.needs)
        one_row = "cache" in self.check.needs and self.subject.missing("cached_rows") is not None
        rows = 1 if one_row else MAX_ROWS
        self.trial(Trial(self.subject, data.draw, dtype=dtype, device=self.settings.device, max_rows=rows))

    def trial(self, trial: Trial) -> None:
        """One, with the global random state and gradient mode as they were afterwards."""
        self.count += 1
        try:
            with time_limit(self.settings.check_seconds):
                trial.run(self.check.function)
        except (UnsatisfiedAssumption, StopTest):  # the subject refused the configuration, or Hypothesis the draw
            self.count -= 1
            raise
        except Exception as error:
            if (why := _why_not(error)) is not None:
                self._does_not_apply(why)
                return
            if self.convincing_only and _is_near_rounding(error):
                self.doubtful = trial, error
                return
            if isinstance(error, CheckFailure) or _is_the_subjects(error):
                self.smallest = self.drawn == 1
                self.failed = trial, error
            raise
        if trial.seen_difference is not None:
            self.effects.append(trial.seen_difference)

    def _does_not_apply(self, why: str) -> None:
        self.not_applicable.append(why)
        self.never_applies = len(self.not_applicable) == self.count >= _NOT_APPLICABLE
        if self.never_applies:
            raise _Enough from None

    def only(self, trial: Trial) -> None:
        """One trial and no other, which may not apply."""
        self.trial(trial)
        if self.not_applicable:
            raise NotApplicable(self.why_not)

    def judged(self, run: Callable[[], object]) -> Result:
        """Call ``run`` and name what came of it."""
        status: Status = "passed"
        reason = failure = None
        try:
            run()
        except OutOfTime:
            status, reason = "error", f"no answer within {self.limit}, in trial {self.count}: it hangs, or is too slow"
        except SystemExit as left:
            status, reason = "error", f"the subject ended the process: exit code {left.code}"
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
                status, reason = "skipped", self.why_not
            elif self.failed is None:
                what = f"{type(raised).__name__}: {raised}"
                status, reason = "error", f"internal error of the check, please report it: {what}"
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
    def why_not(self) -> str:
        """Why it does not apply: what most trials said; one layer may not be what the others are."""
        return Counter(self.not_applicable).most_common(1)[0][0]

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
        values = {**values, "dtype": dtype_name(trial.dtype)}
    recorded = json.dumps(values, separators=(",", ":"))
    device = "" if trial.device == "cpu" else f" --device {trial.device}"
    command = f"diymodel verify {shlex.quote(subject.spec)} --only {check.id}{device} --replay {shlex.quote(recorded)}"
    if isinstance(error, CheckFailure):
        message, causes = error.message, check.causes if error.causes is None else error.causes
        if says_overwritten(message) and (lines := written_by(check, trial, error)):
            message, causes = f"{message}; written over by {lines}", (OVERWRITTEN,)
        return Failure(message, causes, values.get("config", {}), values, command, error.max_abs_diff, error.tolerance)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_a_tools(frame)]
    message = f"the subject raised {type(error).__name__}: {error}"
    if any(frame.name == Subject.made.__name__ and frame.filename.startswith(HARNESS) for frame in frames):
        message += "; it was being built: what it cannot be built of, its factory refuses by NotImplementedError"
    return Failure(
        message, (), values.get("config", {}), values, command, traceback="".join(traceback.format_list(own)).rstrip()
    )


def _why_not(error: Exception) -> str | None:
    """Why a trial that ended so does not apply; None: it does."""
    if isinstance(error, NotApplicable):
        return str(error)
    return said_where(error) if says_not_implemented(error) else None


def _is_the_subjects(error: Exception) -> bool:
    """Whether an error came out of the subject, and not of the harness around it."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        not is_a_tools(frame) or (frame.name in _INTO_SUBJECT and frame.filename.startswith(HARNESS))
        for frame in frames
    )
