"""Timing that survives a noisy machine.

Things are compared by doing them in turn, A B A B …, and taking the ratio within each round: what disturbs the machine
for a second disturbs all. A figure is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Work:
    """Something to time."""

    run: Callable[[], object]  # one unit of work
    reset: Callable[[], object] | None = None  # untimed, before each round
    most_calls: int = 1000  # calls of run between two resets


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 25  # at most
    fewest_rounds: int = 3
    round_seconds: float = 0.1  # for each work in a round
    seconds: float = 30.0  # for all rounds together, kept as long as fewest_rounds allows

    @classmethod
    def quick(cls) -> Effort:
        """Enough to see that everything runs."""
        return cls(rounds=2, fewest_rounds=2, round_seconds=0.005, seconds=1.0)


def interleave(works: Mapping[str, Work], device: torch.device, effort: Effort) -> dict[str, list[float]]:
    """Time the works in turn.

    Returns:
        For each name one figure a round: the median seconds of one call.
    """
    calls: dict[str, int] = {}
    round_seconds = 0.0
    for name, work in works.items():
        first = _time_calls(work, 1, device)[0]  # pays for lazy initialisation, and for compilation
        tries = 1 if first > 1 else min(3, work.most_calls)
        began = time.perf_counter()
        seconds = max(min(_time_calls(work, tries, device)), 1e-9)
        calls[name] = max(1, min(int(effort.round_seconds / seconds), work.most_calls))
        resetting = max(time.perf_counter() - began - tries * seconds, 0.0)
        round_seconds += resetting + seconds * calls[name]
    affordable = int(effort.seconds / round_seconds)
    rounds = max(effort.fewest_rounds, min(effort.rounds, affordable))
    figures: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            figures[name].append(statistics.median(_time_calls(work, calls[name], device)))
    return figures


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    return _time_calls(Work(run), 1, device)[0]


def _time_calls(work: Work, calls: int, device: torch.device) -> list[float]:
    """Seconds of each of several calls in a row.

    On CUDA the calls are queued without waiting in between, with an event after each, as a real loop queues them: where
    the host is slower than the device the distance of two events is the host's time, elsewhere the device's.
    """
    if work.reset is not None:
        work.reset()
    with _no_garbage_collection():
        if device.type == "cuda":
            make_event: Any = torch.cuda.Event
            events = [make_event(enable_timing=True) for _ in range(calls + 1)]
            torch.cuda.synchronize(device)
            events[0].record()
            for event in events[1:]:
                work.run()
                event.record()
            torch.cuda.synchronize(device)
            return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
        seconds = []
        for _ in range(calls):
            began = time.perf_counter()
            work.run()
            seconds.append(time.perf_counter() - began)
        return seconds


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
