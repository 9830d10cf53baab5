"""Checks in child processes: side by side, and a crash or a hang in native code ends one check and not the run."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from diymodel.verify.check_run import run_here
from diymodel.verify.child import Child
from diymodel.verify.failure import SubjectError
from diymodel.verify.registry import Check
from diymodel.verify.report import Result
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject

_PROBING_SECONDS = 150.0  # more than the child itself allows for it
_LONGEST_WAIT = 3600.0  # at a time: poll counts milliseconds in 32 bits
_GRACE = 5.0  # seconds beyond the time for all checks
_PATIENCE = 4  # times the limit of a check: the child itself gives up a hanging trial, and shrinking, before that


@dataclass(frozen=True)
class _Begun:
    """A check that a child is busy with; times are of time.monotonic()."""

    child: Child
    check: Check
    started: float
    until: float  # when it is taken for hung

    @classmethod
    def now(cls, child: Child, check: Check, settings: Settings) -> _Begun:
        started = time.monotonic()
        patience = _PATIENCE * settings.check_seconds
        if settings.deadline is not None:  # a failure at its end may still be made smaller
            patience = min(patience, 2 * max(settings.deadline - started, 0.0) + _GRACE)
        return cls(child, check, started, started + patience)

    def answer(self, subject: Subject, deadline: float | None) -> Result | None:
        """The verdict, or what became of the child; None where the time for all checks was over before."""
        if not self.child.connection.poll():
            if deadline is not None and time.monotonic() > deadline:
                return None
            return self._error(f"no answer within {self._seconds:.0f} s: it hangs in native code, and was ended")
        try:
            result, refused, refusal = self.child.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._error(self.child.why_gone())
        subject.refused |= refused
        subject.refusal = refusal or subject.refusal
        assert isinstance(result, Result)
        return result

    def _error(self, reason: str) -> Result:
        return Result(self.check, "error", seconds=self._seconds, reason=reason)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.started


def run_isolated(
    subject: Subject,
    checks: Sequence[Check],
    settings: Settings,
    jobs: int,
    verify: Callable[[Subject, Check, Settings], Result],
) -> Iterator[Result]:
    """What ``verify`` says of each check, as soon as it says so, as long as there is time.

    Args:
        jobs: how many children work side by side. Each takes the next check when it is done with one; where a check
            ends badly, another takes its place.
    """

    def serve(connection: Connection) -> None:
        with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
            while True:
                number, own = connection.recv()
                result = verify(subject, checks[number], own)
                connection.send((result, subject.refused, subject.refusal))

    waiting, idle = deque(enumerate(checks)), list[Child]()
    begun: dict[Connection, _Begun] = {}
    with contextlib.ExitStack() as children:
        while True:
            while waiting and len(begun) < jobs and (own := settings.in_time()) is not None:
                child = idle.pop() if idle else children.enter_context(Child(serve))
                number, check = waiting.popleft()
                child.connection.send((number, own))
                begun[child.connection] = _Begun.now(child, check, own)
            if not begun:
                return  # all is done, or the time for it is over
            first = min(each.until for each in begun.values())
            ready = wait(list(begun), min(max(first - time.monotonic(), 0.0), _LONGEST_WAIT))
            now = time.monotonic()
            for connection in [each for each in begun if each in ready or begun[each].until <= now]:
                each = begun.pop(connection)
                result = each.answer(subject, settings.deadline)
                if result is None or result.status == "error":
                    each.child.end()  # the interruption may have hit torch in a state it does not recover from
                else:
                    idle.append(each.child)
                if result is not None:
                    yield result


def run_alone(subject: Subject, check: Check, settings: Settings) -> Result:
    """One check in a child of its own, which may leave torch in any state."""
    late = Result(check, "inconclusive", reason="the time for all checks was over before its end")
    return next(run_isolated(subject, [check], settings, 1, run_here), late)


def probe_isolated(subject: Subject) -> None:
    """Find in a child how the subject is called, before this process does.

    Raises:
        SubjectError: it crashes or hangs when it is built or called.
    """
    with Child(lambda connection: connection.send(_probed(subject))) as child:
        if not child.connection.poll(_PROBING_SECONDS):
            raise SubjectError(
                f"{subject.name} did not build and answer a few tiny calls in {_PROBING_SECONDS:g} s: it hangs in "
                "native code"
            )
        try:
            child.connection.recv()
        except EOFError:
            raise SubjectError(f"{subject.name} cannot be built and called: {child.why_gone()}") from None


def _probed(subject: Subject) -> bool:
    try:
        return bool(subject.convention)
    except Exception:  # this process will meet it too, and say it
        return False
