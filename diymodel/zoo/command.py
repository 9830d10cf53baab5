"""``diymodel zoo``: the kill matrix, the bugs as lessons, and as a quiz."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diymodel._files import replace_text, require_place, require_places
from diymodel.verify.options import PROFILE, PROFILES

EXAMPLES = """\
examples:
  diymodel zoo                                    which checks kill which bugs, as it was measured
  diymodel zoo matrix --html zoo.html             the same as a page
  diymodel zoo matrix --measure FILE --jobs 2     measure it anew: every check on every bug; goes on where FILE ends
  diymodel zoo luck --json FILE --seeds 20        how often a short run misses a bug
  diymodel zoo show position-restarts-in-decode   a bug as a diff, and what one sees when training with it
  diymodel zoo quiz 7 --out quiz.py               a model with an unknown bug
  diymodel zoo quiz 7 --answer tie-lost
"""


def add_zoo(commands: Any) -> None:
    """Add ``zoo`` to the parser of ``diymodel``."""
    zoo = commands.add_parser(
        "zoo",
        help="bugs that language models have: what catches each, each as a lesson, and as a quiz",
        description="The correct models and planted bugs that the harness is measured on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    zoo.set_defaults(command=_matrix, **dict.fromkeys(("measure", "html", "svg", "profile", "seed", "jobs")))
    actions = zoo.add_subparsers(metavar="ACTION")

    matrix = actions.add_parser("matrix", help="which checks kill which bugs (default)")
    matrix.set_defaults(command=_matrix)
    matrix.add_argument("--measure", type=Path, metavar="FILE", help="measure it anew, into FILE; hours on one core")
    matrix.add_argument("--profile", choices=PROFILES, help=f"(default: {PROFILE})")
    matrix.add_argument("--seed", type=int, help="(default: 0)")
    matrix.add_argument("--jobs", type=int, metavar="N", help="processes (default: 1)")
    matrix.add_argument("--html", type=Path, metavar="FILE", help="write it as a page")
    matrix.add_argument("--svg", type=Path, metavar="FILE", help="write it as a picture")

    luck = actions.add_parser("luck", help="how often a bug escapes the checks that must kill it, over seeds")
    luck.set_defaults(command=_luck)
    luck.add_argument("--json", type=Path, metavar="FILE", required=True, help="goes on where FILE ends")
    luck.add_argument("--profile", choices=PROFILES, default="quick", help="(default: quick)")
    luck.add_argument("--seeds", type=int, default=20, metavar="N", help="(default: 20)")
    luck.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")

    listing = actions.add_parser("list", help="the classes of bugs")
    listing.set_defaults(command=_list)
    listing.add_argument("--lang", choices=("en", "zh"), default="en", help="(default: en)")

    show = actions.add_parser("show", help="a class of bugs as a lesson")
    show.set_defaults(command=_show)
    show.add_argument("slug", metavar="SLUG", help="diymodel zoo list shows them")
    show.add_argument("--base", metavar="NAME", help="the model to show it in")
    show.add_argument("--lang", choices=("en", "zh"), default="en", help="(default: en)")

    quiz = actions.add_parser("quiz", help="a model with an unknown bug")
    quiz.set_defaults(command=_quiz)
    quiz.add_argument("number", type=int, metavar="NUMBER", help="the same number is the same bug")
    what = quiz.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="write the model; an existing file is not replaced")
    what.add_argument("--answer", metavar="SLUG", help="the class you take it for")


def _matrix(args: argparse.Namespace) -> int:
    from diymodel.verify.samples import Sample, read_samples
    from diymodel.zoo.page import page, picture, text

    require_places(args.measure, args.html, args.svg)
    measuring = {name: value for name in ("profile", "seed", "jobs") if (value := getattr(args, name)) is not None}
    if args.measure is None:
        if measuring:
            named = ", ".join(f"--{name}" for name in measuring)
            raise ValueError(f"{named} without --measure FILE: the matrix as it was measured is shown as it is")
        samples = read_samples()
    else:
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: at least 1")
        from diymodel.zoo.matrix import extend

        def progress(sample: Sample) -> None:
            print(f"{sample.bug}: {len(sample.killers)} checks fail", file=sys.stderr, flush=True)

        samples = extend(args.measure, on_sample=progress, **measuring)
    print(text(samples), end="")
    for path, make in ((args.html, page), (args.svg, picture)):
        if path is not None:
            replace_text(path, make(samples))
    return 0


def _luck(args: argparse.Namespace) -> int:
    from diymodel.zoo.matrix import luck

    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at least 1")
    require_place(args.json)
    escaped = luck(args.json, args.profile, args.seeds, args.jobs)
    for bug, seeds in sorted(escaped.items(), key=lambda item: -len(item[1])):
        if seeds:
            print(f"{len(seeds)}/{args.seeds}  {bug}")
    runs, lost = len(escaped) * args.seeds, sum(map(len, escaped.values()))
    print(f"{runs - lost} of {runs} runs of {len(escaped)} bugs at the {args.profile} profile killed the bug")
    return 0


def _list(args: argparse.Namespace) -> int:
    from diymodel.verify.catalogue import list_bug_classes

    for found in list_bug_classes():
        print(f"{found.area:<12} {found.slug:<36} {found.text(args.lang).what}")
    return 0


def _show(args: argparse.Namespace) -> int:
    import torch

    from diymodel.zoo.lesson import lesson

    torch.set_num_threads(1)
    print(lesson(args.slug, args.base, args.lang), end="")
    return 0


def _quiz(args: argparse.Namespace) -> int:
    from diymodel.verify.catalogue import bug_class
    from diymodel.zoo.quiz import bug_of, quiz_file

    if args.answer is None:
        if args.out.suffix != ".py":
            raise ValueError(f"--out {args.out}: a name that ends in .py, or `diymodel verify` could not import it")
        if args.out.exists():
            raise ValueError(f"{args.out} exists: name another file")
        replace_text(args.out, quiz_file(args.number, args.out.name))
        print(f"{args.out}: diymodel verify {args.out}:subject, then diymodel zoo quiz {args.number} --answer SLUG")
        return 0
    bug, given = bug_of(args.number), bug_class(args.answer)
    if given.slug != bug.slug:
        print(f"no, it is not {given.slug}. {given.what}")
        return 1
    print(f"yes: {given.slug}. {given.what}\ndiymodel zoo show {given.slug} --base {bug.base}")
    return 0
