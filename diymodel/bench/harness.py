"""What verifying costs: seconds of a run by profile, trials a second of a check, and what the plugin adds to pytest.

Seconds are those of the whole command, the import of torch included, on one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diymodel.bench.figures import Spread, ratios, seconds_text
from diymodel.bench.results import finish

CACHED = "decode.cached_equals_full"


def command_seconds(*arguments: str, cwd: Path | None = None) -> float:
    """Wall time of one ``python -m …``, which may come to a bad verdict.

    Raises:
        ValueError: it could not start.
    """
    started = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", *arguments], check=False, capture_output=True, text=True, cwd=cwd)
    if run.returncode not in (0, 1):
        raise ValueError((run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1])
    return time.perf_counter() - started


def measure_run(subject: str, profile: str, rounds: int) -> dict[str, Any]:
    """``diymodel verify`` of a subject: seconds of the command, one check at a time and as many as it runs side by side
    where nothing is said, in turn; and of its slowest checks.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = ("diymodel", "verify", subject, "--profile", profile, "--json", str(report))
        timed = [
            (command_seconds(*command), command_seconds(*command, "--jobs", "1"), loop_ns()) for _ in range(rounds)
        ]
        checks = json.loads(report.read_text(encoding="utf-8"))["checks"]
    slowest = sorted(checks, key=lambda check: -check["seconds"])[:5]
    return {
        "seconds": Spread.of([alone for _, alone, _ in timed]),
        "seconds_side_by_side": Spread.of([together for together, _, _ in timed]),
        "python_loop_ns": Spread.of([ns for _, _, ns in timed]),  # of the core as it was then
        "checks": len(checks),
        "trials": sum(check["examples"] for check in checks),
        "slowest": {check["id"]: check["seconds"] for check in slowest},
    }


def loop_ns() -> float:
    """Nanoseconds for a turn of an empty Python loop, by which seconds compare with those of another core."""
    turns = 10**7
    return timeit.timeit(number=turns) * 1e9 / turns


def measure_trials(rounds: int) -> Spread:
    """Trials a second of "cached equals uncached" on our model: draw, build, prefill, decode, compare."""
    from diymodel.verify.registry import select_checks
    from diymodel.verify.runner import run_check
    from diymodel.verify.settings import Settings
    from diymodel.verify.subject import resolve

    (check,) = select_checks([CACHED])
    subject = resolve(None)
    run_check(subject, check, Settings(examples=20))  # warm
    results = [run_check(subject, check, Settings(examples=400, seed=seed)) for seed in range(rounds)]
    return Spread.of([result.examples / result.seconds for result in results])


def measure_plugin(rounds: int) -> Spread:
    """``pytest --co`` in a project that has nothing to do with us, with the plugin by without it, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_unrelated.py").write_text("def test_nothing(): pass\n", encoding="utf-8")
        base = ("pytest", "--co", "-q", "-p", "no:cacheprovider")
        pairs = [
            (command_seconds(*base, cwd=Path(folder)), command_seconds(*base, "-p", "no:diymodel", cwd=Path(folder)))
            for _ in range(rounds)
        ]
    return ratios([with_it for with_it, _ in pairs], [without for _, without in pairs])


def run(document: dict[str, Any], subjects: Sequence[str], quick: bool, path: Path | None) -> None:
    """Measure, print and write."""
    rounds = 1 if quick else 3
    document["runs"] = {}
    for subject in subjects:
        for profile in ("quick",) if quick else ("quick", "standard"):
            document["runs"][f"{subject} {profile}"] = found = measure_run(subject, profile, rounds)
            alone, together = (seconds_text(found[kind].median) for kind in ("seconds", "seconds_side_by_side"))
            print(
                f"verify {subject} --profile {profile}: {alone} by --jobs 1, {together} without, {found['trials']} "
                f"trials, on cores at {found['python_loop_ns'].median:.1f} ns a turn of an empty Python loop",
                flush=True,
            )
    document["trials_per_second"] = {CACHED: (trials := measure_trials(rounds))}
    print(f"{CACHED}: {trials.median:.0f} trials a second", flush=True)
    document["ratios"] = {"pytest_collect_with_plugin/without": (plugin := measure_plugin(3 * rounds))}
    print(f"pytest --co with the plugin by without: {plugin.text()}")
    finish(document, path)
