"""What verifying costs, under pytest-benchmark."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Time
from diymodel.bench.harness import CACHED
from diymodel.bench.timing import Work
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import run_check
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve


@pytest.mark.benchmark(group="100 trials of a check")
@pytest.mark.parametrize("name", [CACHED, "causality.edit", "loss.value"])
def test_trials(time_work: Time, name: str) -> None:
    (check,) = select_checks([name])
    subject = resolve(None)
    time_work(Work(lambda: run_check(subject, check, Settings(examples=100))), "cpu", 3)
