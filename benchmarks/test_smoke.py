"""The timed tests' own code, run once at the tiniest size without timing, and the exponents that are printed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import conftest, test_decode, test_prefill, test_training
from diymodel.bench.timing import Work


class _Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reportchars = "sf"
        self.section = self.write_line = self.lines.append


@pytest.fixture
def once() -> conftest.Time:
    def run(work: Work, *_: object) -> None:
        if work.reset is not None:
            work.reset()
        work.run()

    return run


def test_every_work_runs(once: conftest.Time) -> None:
    for cache in ("ours", "concatenated", "masked"):
        test_decode.test_cached_step(once, "T256", "cpu", 64, cache)
    test_decode.test_uncached_step(once, "T256", "cpu", 64)
    test_decode.test_generate(once, "T256", "cpu", True)
    test_prefill.test_prefill(once, "T256", "cpu", 32)
    test_training.test_training_step(once, "T256", "cpu", "bfloat16")


def test_the_summary_states_the_exponents(pytestconfig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _Lines()
    conftest.pytest_terminal_summary(out, pytestconfig)
    assert not out.lines, "a plain run has no such summary"
    monkeypatch.setattr(pytestconfig.option, "benchmark_only", True)
    curves = {"T, cpu, without cache": {64: 1.0, 256: 4.0, 1024: 16.0}, "a single point": {64: 1.0}}
    monkeypatch.setitem(pytestconfig.stash._storage, conftest._CURVES, curves)
    conftest.pytest_terminal_summary(out, pytestconfig)
    text = "\n".join(out.lines)
    assert "attention  T^2.99" in text or "attention  T^3.00" in text
    assert "T, cpu, without cache" in text
    assert "t^1.00  [1.00 1.00]  over 64 … 1024" in text
    assert "a single point" not in text
    assert out.reportchars == "f", "thousands of skipped tests would push the exponents out of sight"
