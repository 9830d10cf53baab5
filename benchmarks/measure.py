"""Timing that survives a noisy machine, and results that say where they come from.

Two things are compared by doing them in turn, A B A B …, and taking the ratio within each round: what disturbs the
machine for a second disturbs both. A figure is the median over the rounds, with its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Work:
    """Something to time."""

    run: Callable[[], object]  # one unit of work
    reset: Callable[[], object] | None = None  # untimed, before each round
    most_calls: int = 1000  # calls of run between two resets


@dataclass(frozen=True)
class Spread:
    """The middle half of a set of figures."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


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
        began = time.perf_counter()
        seconds = _time_calls(work, 1, device)[0]  # the first call pays for lazy initialisation …
        if seconds < 1:  # … which a long one does not notice
            began = time.perf_counter()
            seconds = max(min(_time_calls(work, min(3, work.most_calls), device)), 1e-9)
        calls[name] = max(1, min(int(effort.round_seconds / seconds), work.most_calls))
        resetting = max(time.perf_counter() - began - 3 * seconds, 0.0)
        round_seconds += resetting + seconds * calls[name]
    affordable = int(effort.seconds / round_seconds)
    rounds = max(effort.fewest_rounds, min(effort.rounds, affordable))
    figures: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            figures[name].append(statistics.median(_time_calls(work, calls[name], device)))
    return figures


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the ratio within each round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def seconds_text(seconds: float) -> str:
    """Seconds with three digits and a unit, for a table."""
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"


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
            events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
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


@dataclass(frozen=True)
class Fit:
    """``y ∝ x^exponent``, by least squares on the logarithms."""

    exponent: float
    local: list[float]  # between each two neighbouring points

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
        points = itertools.pairwise(zip(log_x, log_y, strict=True))
        local = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in points]
        return cls(statistics.linear_regression(log_x, log_y).slope, local)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where, with what and when a result was measured."""
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return machine


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is measured; a copy without .git can be told by the environment variable DIYMODEL_COMMIT."""
    if "DIYMODEL_COMMIT" in os.environ:
        return os.environ["DIYMODEL_COMMIT"]
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "diymodel"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} and uncommitted changes" if changes.stdout else commit


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, ensure_ascii=False, default=_plain)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def finish(document: Mapping[str, Any], path: Path | None) -> None:
    """What every script ends with: the file, if one is wanted, and the same document as the last line printed."""
    if path is not None:
        write_results(path, document)
    print(json.dumps(document, ensure_ascii=False, default=_plain))


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, (Spread, Fit)):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not belong in a results file")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure; cpu: one thread")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the models")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options.add_argument("--quick", action="store_true", help="only see that it runs; the figures mean nothing")
    return options


def start(options: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a run; on a CPU from here on one thread."""
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: torch sees no CUDA device here")
    if args.device == "cpu":
        torch.set_num_threads(1)
    return torch.device(args.device), getattr(torch, args.dtype)
