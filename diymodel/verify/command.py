"""``diymodel verify``, ``list`` and ``explain``. Torch is imported once a command runs, not for its ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diymodel._files import replace_text, require_places
from diymodel.verify.options import CHECK_SECONDS, DTYPES, PROFILE, PROFILES

if TYPE_CHECKING:
    from diymodel.verify.report import Report, Result

_MOST_JOBS = 4  # by default: a machine of many cores has other users, and no run is worth more than a few

EXAMPLES = """\
examples:
  diymodel verify                          our own model
  diymodel verify my_model.py:MyLM         a class or a function config -> nn.Module
  diymodel verify hf:llama                 a tiny random transformers model of that type
  diymodel verify path/to/directory        a model that save_pretrained wrote, and its weights
  diymodel verify my_model.py:MyLM --step 3 --only 'decode.*'
  diymodel explain decode.cached_equals_full --lang zh
"""


def add_commands(commands: Any) -> None:
    """Add the harness's commands to the parser of ``diymodel``."""
    verify = commands.add_parser(
        "verify",
        help="prove or refute that a causal language model behaves",
        description="Run every property on SUBJECT. Exit code: 0 passed: no check failed (unless it was expected to), "
        "and not all were skipped or inconclusive; 1 a check failed, or none came to a verdict; 2 SUBJECT cannot be "
        "found, built or called; 130 Ctrl-C, with what was found by then. What SUBJECT itself prints is shown with "
        "--replay only.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.set_defaults(command=_verify)
    verify.add_argument(
        "subject",
        nargs="?",
        help="path/to/file.py:name, package.module:name, hf:MODEL_TYPE, or a directory with a config.json "
        "(default: diymodel's own model)",
    )
    verify.add_argument("--profile", choices=PROFILES, default=PROFILE)
    verify.add_argument("--seed", type=int, default=0, help="the same seed gives the same report (default: 0)")
    verify.add_argument("--step", help="one step of the roadmap, 3 or 3.2 (default: all)")
    verify.add_argument("--only", metavar="GLOB", action="append", default=[], help="checks to run; repeatable")
    verify.add_argument("--skip", metavar="GLOB", action="append", default=[], help="checks to leave out; repeatable")
    verify.add_argument(
        "--expect-fail",
        metavar="ID=REASON",
        action="append",
        default=[],
        help="run it, and do not count its failure; repeatable",
    )
    verify.add_argument("--device", default="cpu", help="where the modules are built (default: cpu)")
    verify.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the modules (default: float64, in which bugs and rounding are worlds apart, or what SUBJECT runs in)",
    )
    verify.add_argument("--time-budget", type=float, metavar="SECONDS", help="report what is known after this time")
    verify.add_argument(
        "--check-seconds",
        type=float,
        metavar="SECONDS",
        default=CHECK_SECONDS,
        help="begin no further trial of a check after this time; one that takes as long hangs (default: %(default)g)",
    )
    verify.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help=f"checks that run side by side (default: one a core, {_MOST_JOBS} at most; on a GPU one)",
    )
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the report as one JSON document")
    verify.add_argument("--html", type=Path, metavar="FILE", help="write the report as one self-contained page")
    verify.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the report (default: en)")
    verify.add_argument("--replay", metavar="JSON", help="run the one check of --only on these recorded values")

    listing = commands.add_parser("list", help="list the checks")
    listing.set_defaults(command=_list)
    listing.add_argument("--lang", choices=("en", "zh"), default="en", help="(default: en)")

    explain = commands.add_parser("explain", help="what a check means, why it matters, and how to fix a failure")
    explain.set_defaults(command=_explain)
    explain.add_argument("check", metavar="CHECK", help="the id of a check; diymodel list shows them")
    explain.add_argument("--lang", choices=("en", "zh"), default="en", help="(default: en)")


def _verify(args: argparse.Namespace) -> int:
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # before torch imports it: a generate would draw its bar a thousand times
    from diymodel.verify.runner import check_causal_lm

    if args.replay is not None:
        return _replay(args)
    require_places(args.json, args.html)
    _make_absolute(args)
    with (
        _stopped_as_by_ctrl_c(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # what the module prints
    ):
        report = check_causal_lm(
            args.subject,
            profile=args.profile,
            seed=args.seed,
            only=args.only,
            skip=args.skip,
            step=args.step,
            expected_failures=dict(_expectation(text) for text in args.expect_fail),
            device=args.device,
            dtype=args.dtype,
            time_budget=args.time_budget,
            check_seconds=args.check_seconds,
            isolate=True,
            jobs=_default_jobs(args.device) if args.jobs is None else args.jobs,
            on_result=_progress,
        )
    _clear_progress()
    print(report.to_text(_wants_color(), args.lang), end="")
    _write(report, args)
    if report.cancelled:
        return 130
    return 0 if report.verdict == "passed" else 1


@contextlib.contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, which the time limit of a job sends, leaves the report so far as well."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _default_jobs(device: str) -> int:
    """A GPU is shared badly: each process begins with seconds and half a gigabyte of its own."""
    if not device.startswith("cpu"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_JOBS)


def _replay(args: argparse.Namespace) -> int:
    from diymodel.verify.registry import select_checks
    from diymodel.verify.runner import replay
    from diymodel.verify.text import failure_lines

    checks = select_checks(args.only)
    if len(checks) != 1:
        raise ValueError("--replay needs one check: name it with --only ID")
    try:
        values = json.loads(args.replay)
    except json.JSONDecodeError as error:
        raise ValueError(f"--replay takes the JSON that the report printed: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--replay takes the JSON object that the report printed, got {args.replay}")
    if args.json is not None or args.html is not None:
        raise ValueError("--replay prints one verdict and writes no report: leave out --json and --html")
    if ignored := [f"--{name}" for name in ("dtype", "step", "skip") if getattr(args, name)]:
        raise ValueError(f"--replay takes everything from the recorded values: leave out {' and '.join(ignored)}")
    result = replay(args.subject, checks[0], values, args.device)
    if result.status not in ("failed", "error"):
        print(f"{result.status}: {checks[0].id} {result.reason or ''}".rstrip())
        return 0 if result.status == "passed" else 1
    print("\n".join(failure_lines(result, _wants_color(), args.lang)))
    return 1


def _list(args: argparse.Namespace) -> int:
    from diymodel.verify.explain import title
    from diymodel.verify.registry import list_checks

    zh = args.lang == "zh"
    for check in list_checks():
        names = ", ".join(check.needs)
        needs = "" if not names else f"（需要 {names}）" if zh else f"  (needs {names})"
        optional = "（可选：用 --only 点名）" if zh else "  (optional: name it with --only)"
        print(f"{check.step}  {check.id:<36} {title(check, args.lang)}{needs}{optional if check.optional else ''}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from diymodel.verify.explain import explain

    print(explain(args.check, args.lang))
    return 0


def _expectation(text: str) -> tuple[str, str]:
    id, equals, reason = text.partition("=")
    if not equals or not reason:
        raise ValueError(f"--expect-fail {text!r}: write ID=REASON")
    return id, reason


def _progress(result: Result) -> None:
    """On a terminal, say which check was last; a pipe gets the report alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{result.check.id}: {result.status}", end="", file=sys.stderr, flush=True)


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _wants_color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _make_absolute(args: argparse.Namespace) -> None:
    """The files to be written, which a subject may lose that changes the working directory."""
    for name in ("json", "html"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.absolute())


def _write(report: Report, args: argparse.Namespace) -> None:
    if args.json is not None:
        replace_text(args.json, report.to_json())
    if args.html is not None:
        from diymodel.verify.html import to_html

        replace_text(args.html, to_html(report, args.lang))
