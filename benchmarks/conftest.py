"""What the timed tests share, and the exponents at the end of ``pytest --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diymodel.bench.decoders import Benched
from diymodel.bench.figures import Fit
from diymodel.bench.scaling import THEORY, count_steps, total_flops
from diymodel.bench.shapes import SHAPES
from diymodel.bench.timing import Work

Time = Callable[..., None]
Curves = dict[str, dict[int, float]]  # name -> length -> median seconds

DOUBLINGS = (64, 128, 256, 512, 1024, 2048)
_CURVES: pytest.StashKey[Curves] = pytest.StashKey()


@pytest.fixture
def time_work(benchmark: Any, request: pytest.FixtureRequest) -> Time:
    """``time_work(work, device, rounds, curve=None, length=0)``: one call a round.

    pytest-benchmark does not wait for a device, so the calls do. Points of a ``curve`` are fitted at the end.
    """

    def measure(work: Work, device: str, rounds: int, curve: str | None = None, length: int = 0) -> None:
        def wait() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        def reset() -> None:
            if work.reset is not None:
                work.reset()
            wait()

        def run() -> None:
            work.run()
            wait()

        benchmark.pedantic(run, setup=reset, rounds=rounds, warmup_rounds=2)
        if curve is not None and benchmark.stats is not None:
            curves = request.config.stash.setdefault(_CURVES, {})
            curves.setdefault(curve, {})[length] = benchmark.stats.stats.median

    return measure


def exponents() -> dict[str, dict[str, Fit]]:
    """Exponents of the FLOPs of a generation, hidden 512 × 8 layers, over 64 … 2048 tokens: counted, not timed."""
    decoder = Benched(None, SHAPES["S"]).decoder(torch.device("meta"), torch.float32)
    steps = {way: count_steps(decoder, DOUBLINGS, way == "cached") for way in ("no_cache", "cached")}
    prefill = count_steps(decoder, [1], use_cache=False)[1]
    found: dict[str, dict[str, Fit]] = {}
    for way, costs in steps.items():
        totals = [total_flops(costs, prefill if way == "cached" else None, 1, tokens) for tokens in DOUBLINGS]
        kinds = {"all": "flops", "linear": "linear_flops", "attention": "attention_flops"}
        found[way] = {kind: Fit.of(DOUBLINGS, [total[name] for total in totals]) for kind, name in kinds.items()}
    return found


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("benchmark_only", default=False):
        return
    out = terminalreporter
    out.reportchars = out.reportchars.replace("s", "")  # every other test is skipped, which is no news
    out.section("growth of the FLOPs of a generation, hidden 512 × 8 layers, 64 … 2048 tokens (counted)")
    for way, fits in exponents().items():
        for kind, fit in fits.items():
            theory = THEORY[way].get(kind)
            beside = f"  theory {theory:.2f}" if theory else ""
            local = " ".join(f"{slope:.2f}" for slope in fit.local)
            out.write_line(f"{way:<10} {kind:<10} T^{fit.exponent:.2f}  [{local}]{beside}")
    curves = {name: points for name, points in config.stash.get(_CURVES, {}).items() if len(points) > 1}
    if curves:
        out.section("growth of the seconds of a step (timed, on this machine)")
    for name, points in curves.items():
        lengths = sorted(points)
        fit = Fit.of(lengths, [points[length] for length in lengths])
        local = " ".join(f"{slope:.2f}" for slope in fit.local)
        out.write_line(f"{name:<40} t^{fit.exponent:.2f}  [{local}]  over {lengths[0]} … {lengths[-1]}")
