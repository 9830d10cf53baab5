"""How often the harness cries wolf: every check on correct models, over many seeds.

Each (subject, profile, seed) is one run of the whole list of checks, or with ``--only`` of those that are new. Finished
runs are kept in the result file at once, and are not done again, so a measurement can be interrupted and go on, on this
machine or on another.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from diymodel._machine import describe_machine
from diymodel.bench.results import write_results
from diymodel.verify import check_causal_lm
from diymodel.verify.options import PROFILES
from diymodel.zoo.base import BASES

ZOO = "zoo:"


def run(subject: str, profile: str, seed: int, only: tuple[str, ...]) -> dict[str, Any]:
    """One run: how many trials decided something, and which checks failed; none should."""
    torch.set_num_threads(1)
    found = BASES[subject.removeprefix(ZOO)].subject() if subject.startswith(ZOO) else subject
    report = check_causal_lm(found, profile=profile, seed=seed, only=only, check_seconds=600.0)
    return {
        "subject": subject,
        "profile": profile,
        "seed": seed,
        **({"only": list(only)} if only else {}),
        "trials": sum(result.examples for result in report.results if result.status == "passed"),
        "statuses": dict(Counter(result.status for result in report.results)),
        "alarms": [f"{result.check.id}: {_said(result)}" for result in report.failed],
        "seconds": round(report.seconds, 1),
    }


def _said(result: Any) -> str:
    return result.failure.message if result.failure is not None else str(result.reason)


def totals(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By subject and profile, and in all: seeds, trials, alarms."""
    table: dict[str, Any] = {}
    for one in runs:
        for name in (f"{one['subject']} {one['profile']}", "all"):
            row = table.setdefault(name, {"runs": 0, "trials": 0, "alarms": 0})
            row["runs"] += 1
            row["trials"] += one["trials"]
            row["alarms"] += len(one["alarms"])
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", help=f"what diymodel verify takes, {ZOO}NAME, or {ZOO}all")
    parser.add_argument("--profile", choices=PROFILES, default="standard")
    parser.add_argument("--seeds", type=int, default=20, help="seeds 0 to N - 1 (default: 20)")
    parser.add_argument("--only", action="append", default=[], help="glob of the ids of new checks (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--json", type=Path, required=True, help="result file; what it holds already is not run again")
    args = parser.parse_args()
    subjects = [
        name for given in args.subjects for name in ([ZOO + n for n in BASES] if given == ZOO + "all" else [given])
    ]
    document = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {"runs": []}
    only = tuple(sorted(args.only))
    done = {(one["subject"], one["profile"], one["seed"], tuple(one.get("only", ()))) for one in document["runs"]}
    wanted = [(s, args.profile, seed, only) for seed, s in itertools.product(range(args.seeds), subjects)]
    context = multiprocessing.get_context("spawn")  # a child that has called backward cannot be forked again
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(run, *key) for key in wanted if key not in done]
        for future in concurrent.futures.as_completed(futures):
            machine = describe_machine(torch.device("cpu"))
            one = future.result() | {key: machine[key] for key in ("date", "commit", "torch", "transformers")}
            document["runs"].append(one)
            document["machine"] = machine
            document["totals"] = totals(document["runs"])
            write_results(args.json, document)
            print(
                f"{one['subject']} {one['profile']} seed {one['seed']}: {one['trials']} trials in {one['seconds']} s, "
                f"{len(one['alarms'])} alarms {one['alarms'] or ''}",
                flush=True,
            )
    print(json.dumps(document.get("totals", {})))
    return 1 if any(one["alarms"] for one in document["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
