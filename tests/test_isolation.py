"""Checks in children: what a crash, a hang or the end of the time does to one of them, and to the others."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import nn

from diymodel import DIYConfig
from diymodel.verify import SubjectError, check_causal_lm
from diymodel.verify.check_run import run_here
from diymodel.verify.child import Child, can_fork
from diymodel.verify.isolation import run_isolated
from diymodel.verify.settings import Settings
from diymodel.verify.trial import Trial
from tests.test_runner import ONLY, check, misbehaving, own

pytestmark = pytest.mark.skipif(not can_fork(), reason="needs fork")


class _Meeting:
    """Where two processes wait for each other; one alone waits until it is given up."""

    folder = Path()

    def __call__(self, name: str) -> None:
        (self.folder / f"{name}-{os.getpid()}").touch()
        while len(list(self.folder.glob(f"{name}-*"))) < 2:
            time.sleep(0.01)


meet = _Meeting()


def meet_and_pass(_: Trial) -> None:
    meet("first")


def meet_and_leave(_: Trial) -> None:
    meet("first")
    os._exit(3)


def meet_again(_: Trial) -> None:
    meet("second")


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda: ctypes.string_at(0), "the process died of SIGSEGV: the subject crashed in native code"),
        (lambda: os._exit(3), "the process ended with exit code 3: the subject left Python"),
        (lambda: os._exit(0), "the process ended with exit code 0: the subject left Python"),
        (lambda: sys.exit(0), "the subject ended the process: exit code 0"),
    ],
    ids=["crash", "exit", "exit-0", "sys-exit"],
)
def test_a_crash_ends_one_check_and_the_others_go_on(act: Callable[[], object], reason: str) -> None:
    subject = misbehaving(act)
    only = [*ONLY, "gradients.absent_tokens_zero"]
    report = check_causal_lm(subject, only=only, isolate=True)
    assert len(report.results) == len(only)
    assert report.results[0].status == "error"
    assert report.results[0].reason == reason
    assert "diymodel" not in str(report.results[0].failure)


def hang_natively() -> None:
    """As a kernel that never comes back: no signal gets through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


def test_a_first_call_that_hangs_in_native_code_is_told() -> None:
    def hanging(_: DIYConfig) -> nn.Module:
        hang_natively()
        raise AssertionError

    with (
        mock.patch("diymodel.verify.isolation._PROBING_SECONDS", 0.5),
        pytest.raises(SubjectError, match=r"hanging did not build and answer a few tiny calls in 0.5 s: it hangs"),
    ):
        check_causal_lm(hanging, only=ONLY, isolate=True)


def test_at_the_end_of_the_time_nobody_is_blamed_for_hanging() -> None:
    started = time.monotonic()
    with mock.patch("diymodel.verify.isolation._GRACE", 0.5):
        report = check_causal_lm(misbehaving(hang_natively), only=ONLY, isolate=True, time_budget=3.0)
    assert time.monotonic() - started < 30
    assert report.verdict != "failed", report.to_text()
    assert str(report.interrupted).startswith("the time budget of 3 s ran out before a verdict on ")


@pytest.mark.parametrize("jobs", [1, 3])
def test_isolated_checks_give_the_same_report(jobs: int) -> None:
    def document(isolate: bool) -> dict[str, Any]:
        only = ["shape.*", "batch.*"]
        found = check_causal_lm("diymodel", profile="quick", only=only, isolate=isolate, jobs=jobs).to_dict()
        for part in (found, *found["checks"]):
            del part["seconds"]
        return found

    assert document(isolate=True) == document(isolate=False)


def test_without_jobs_nothing_runs() -> None:
    with pytest.raises(ValueError, match="jobs=0 must be above 0"):
        check_causal_lm(jobs=0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_child_ends_with_its_parent() -> None:
    def starts_another(connection: Connection) -> None:
        with Child(lambda _: hang_natively()) as inner:
            connection.send(inner.pid)
            hang_natively()

    with Child(starts_another) as outer:
        pid = outer.connection.recv()
        assert Path(f"/proc/{pid}").exists()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_checks_run_side_by_side_and_another_child_takes_the_place_of_one_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meet, "folder", tmp_path)
    functions = {"a": meet_and_pass, "b": meet_and_leave, "c": meet_again, "d": meet_again}
    checks = [replace(check(function), id=id) for id, function in functions.items()]
    settings = Settings(examples=1, check_seconds=20)
    done = {result.check.id: result.status for result in run_isolated(own(), checks, settings, 2, run_here)}
    assert done == {"a": "passed", "b": "error", "c": "passed", "d": "passed"}
