"""Checks in a child process, so that a crash or a hang in native code ends one check and not the run."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from diymodel.verify.examination import Findings, examine
from diymodel.verify.failure import SubjectError
from diymodel.verify.registry import Check
from diymodel.verify.report import Result
from diymodel.verify.runner import Settings, run_checks, run_here
from diymodel.verify.subject import Subject

_Run = Callable[[Subject, Sequence[Check], Settings], Iterator[Result]]

_PROBING_SECONDS = 150.0  # more than the child itself allows for it
_OBSERVE_SECONDS = 120.0
_GRACE = 5.0  # seconds beyond the time for all checks
_PATIENCE = 4  # times the limit of a check: the child itself gives up a hanging trial, and shrinking, before that


def can_isolate() -> bool:
    """Whether a child can take over here: only by fork, since a stranger's factory cannot be pickled."""
    return hasattr(os, "fork") and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def run_isolated(subject: Subject, checks: Sequence[Check], settings: Settings) -> Iterator[Result]:
    """As :func:`run_checks`, with one child for all checks, and a new one after each that ended badly."""
    left = list(checks)
    while left:
        result = None
        for result in _in_child(subject, tuple(left), settings, run_checks):
            left.pop(0)
            yield result
        if result is None or result.status != "error":
            return  # all is done, or the time for it is over


def run_alone(subject: Subject, check: Check, settings: Settings) -> Result:
    """One check in a child of its own, which may leave torch in any state."""
    late = Result(check, "inconclusive", reason="the time for all checks was over before its end")
    return next(_in_child(subject, [check], settings, _run_here), late)


def _run_here(subject: Subject, checks: Sequence[Check], settings: Settings) -> Iterator[Result]:
    return (run_here(subject, check, settings) for check in checks)


def probe_isolated(subject: Subject) -> None:
    """Find in a child how the subject is called, before this process does.

    Raises:
        SubjectError: it crashes or hangs when it is built or called.
    """
    with _child(lambda sender: sender.send(_probed(subject))) as (process, receiver):
        if not receiver.poll(_PROBING_SECONDS):
            raise SubjectError(
                f"{subject.name} did not build and answer a few tiny calls in {_PROBING_SECONDS:g} s: it hangs in "
                "native code"
            )
        try:
            receiver.recv()
        except EOFError:
            process.join()
            raise SubjectError(f"{subject.name} cannot be built and called: {_died(process.exitcode)}") from None


def _probed(subject: Subject) -> bool:
    try:
        return bool(subject.convention)
    except Exception:  # this process will meet it too, and say it
        return False


def examine_isolated(subject: Subject, results: Sequence[Result], device: str = "cpu") -> Iterator[Findings]:
    """As :func:`examine`, in a child of its own; no more than what was found before that crashes or hangs."""

    def work(sender: Connection) -> None:
        for found in examine(subject, results, device):
            sender.send(found)

    yield Findings()
    until = time.monotonic() + _OBSERVE_SECONDS
    with _child(work) as (_, receiver), contextlib.suppress(EOFError):
        while receiver.poll(max(until - time.monotonic(), 0.0)):
            yield receiver.recv()


def _in_child(subject: Subject, checks: Sequence[Check], settings: Settings, run: _Run) -> Iterator[Result]:
    """The results that one child gives; the last is that of the check that ended it, if one did."""

    def work(sender: Connection) -> None:
        for result in run(subject, checks, settings):
            sender.send((result, subject.refused, subject.refusal))
        sender.send(None)

    with _child(work) as (process, receiver):
        for check in checks:
            started = time.perf_counter()
            if not receiver.poll(_patience(settings)):
                if settings.deadline is not None and time.monotonic() > settings.deadline:
                    return
                yield Result(check, "error", seconds=_since(started), reason=_hung(started))
                return
            try:
                sent = receiver.recv()
            except EOFError:
                process.join()
                yield Result(check, "error", seconds=_since(started), reason=_died(process.exitcode))
                return
            if sent is None:  # the time for all checks is over
                return
            result, subject.refused, subject.refusal = sent
            yield result
            if result.status == "error":  # the interruption may have hit torch in a state it does not recover from
                return


@contextlib.contextmanager
def _child(work: Callable[[Connection], object]) -> Iterator[tuple[BaseProcess, Connection]]:
    """A child that calls ``work`` with where to send what it finds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, work))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads; torch's are idle
        process.start()
    sender.close()  # so that the child's end is the only one, and its death an EOFError
    try:
        yield process, receiver
    finally:
        process.kill()
        process.join()
        receiver.close()


def _work(sender: Connection, work: Callable[[Connection], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    faulthandler.disable()  # a crash is the report's to tell
    stderr = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:  # a line that the module prints is printed thousands of times
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        work(sender)
    except BaseException:  # the harness's own
        os.dup2(stderr, 2)
        raise


def _patience(settings: Settings) -> float:
    """Seconds to wait for one verdict; where time is short, a failure at its end may still be made smaller."""
    patience = _PATIENCE * settings.check_seconds
    if settings.deadline is None:
        return patience
    return min(patience, 2 * max(settings.deadline - time.monotonic(), 0.0) + _GRACE)


def _since(started: float) -> float:
    return time.perf_counter() - started


def _hung(started: float) -> str:
    return f"no answer within {_since(started):.0f} s: it hangs in native code, and was ended"


def _died(exitcode: int | None) -> str:
    """Why the child is gone, in words."""
    if exitcode is not None and exitcode < 0:
        return f"the process died of {signal.Signals(-exitcode).name}: the subject crashed in native code"
    return f"the process ended with exit code {exitcode}: the subject left Python"
