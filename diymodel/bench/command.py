"""``diymodel bench …``. Torch is imported once a command runs, not for its ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diymodel._files import require_place
from diymodel.bench.shapes import SHAPES, parse_lengths, parse_shapes

if TYPE_CHECKING:
    import torch

    from diymodel.bench.timing import Effort

_LENGTHS = "32,64,128,256,512,1024,2048"
_EXAMPLES = """\
examples:
  diymodel bench decode                              our own model, hidden 512 × 8 layers
  diymodel bench decode my_model.py:LM --shape T     a stranger's
  diymodel bench decode --device cuda --dtype bfloat16 --shape L --json gpu.json
  diymodel bench plot cpu.json gpu.json --out scaling.svg --lang zh
  diymodel bench compare old.json new.json
"""


def add_bench(commands: Any) -> None:
    """Add ``bench`` to the parser of ``diymodel``."""
    bench = commands.add_parser(
        "bench",
        help="what a model costs: with and without a cache, beside its peers, in training",
        description="Measure. Each measurement prints a table and, as its last line, one JSON document.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = bench.add_subparsers(dest="bench_name", metavar="WHAT", required=True)
    _add_decode(kinds)
    _add_peers(kinds)
    _add_prefill(kinds)
    _add_training(kinds)
    _add_harness(kinds)
    _add_plot(kinds)
    _add_compare(kinds)


# ------------------------------------------------------------------------------------------------------- measurements


def _add_decode(kinds: Any) -> None:
    parser = _measurement(
        kinds,
        "decode",
        _decode,
        "a decode step and a generation, without cache and with it: FLOPs, seconds, memory, exponents",
    )
    parser.add_argument(
        "subject",
        nargs="?",
        help="as diymodel verify takes it: path/to/file.py:name, package.module:name, hf:MODEL_TYPE, a directory "
        "(default: our own model, with other kinds of cache beside it)",
    )
    parser.add_argument("--shape", choices=SHAPES, default="S", help="sizes to build it in (default: %(default)s)")
    parser.add_argument("--lengths", default=_LENGTHS, metavar="N,N,…", help="positions (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=1, metavar="N", help="tokens to continue (default: %(default)s)")
    parser.add_argument(
        "--engines",
        metavar="NAME,…",
        help="static steps beside ours: masked_compiled, masked_graph, masked_compiled_graph, none (default: all on "
        "CUDA, none on a CPU, where compiling takes a minute)",
    )
    parser.add_argument(
        "--affordable",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="generations longer than this are not run, but summed from their steps (default: %(default)g)",
    )


def _decode(args: argparse.Namespace) -> int:
    from diymodel.bench.compiled import ENGINES
    from diymodel.bench.decode import ROOM, Plan, measure
    from diymodel.bench.decode_table import print_head, print_progress, print_rest, print_row
    from diymodel.bench.decoders import Benched
    from diymodel.bench.results import finish

    device, dtype, effort, document = _begin(args, rounds=15, seconds=15)
    subject = Benched(args.subject, SHAPES[args.shape])
    if args.prompt < 1:
        raise ValueError(f"--prompt {args.prompt}: a generation continues at least one token")
    longest = subject.longest - ROOM - (args.prompt - 1)
    lengths = _within(args.lengths, longest)
    chosen = args.engines or (",".join(ENGINES) if device.type == "cuda" else "none")
    engines = [] if chosen == "none" else chosen.split(",")
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ValueError(f"--engines {','.join(unknown)}: there are {', '.join(ENGINES)}, and none")
    document |= {
        "subject": subject.name,
        "called_as": subject.called_as,
        "shape": None if subject.fixed else args.shape,
        "config": _config(subject.config),
    }
    print(f"{subject.name}, {document['shape'] or 'its own sizes'}, {args.dtype}, {_where(document)}")
    print(f"called as {subject.called_as}")
    affordable = min(args.affordable, 1.0) if args.quick else args.affordable
    print_head()
    plan = Plan(lengths, args.prompt, device, dtype, effort, affordable, engines)
    result = measure(subject, plan, print_row, print_progress)
    print_rest(result)
    finish(document | result, args.json)
    return 0


def _within(text: str, longest: int) -> list[int]:
    """The lengths that are asked for; those of the default that the subject cannot hold are left out."""
    if text != _LENGTHS:
        return parse_lengths("--lengths", text, longest)
    lengths = [length for length in map(int, _LENGTHS.split(",")) if length <= longest]
    return lengths if len(lengths) > 1 else sorted({max(longest // 4, 4), max(longest // 2, 5), max(longest, 6)})


def _add_peers(kinds: Any) -> None:
    parser = _measurement(
        kinds, "peers", _peers, "a decode step, a generation and construction, beside transformers, litgpt and others"
    )
    parser.add_argument("--shapes", default="T,S", metavar="NAME,…", help="(default: %(default)s)")
    parser.add_argument("--peers", metavar="NAME,…", help="(default: all that are installed)")
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens to continue (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts at a time (default: %(default)s)")
    parser.add_argument(
        "--compiled", action="store_true", help="compiled steps as well, ours and the peers': a minute each on a CPU"
    )
    parser.add_argument("--resume", action="store_true", help="keep the shapes that the --json file has already")


def _peers(args: argparse.Namespace) -> int:
    from diymodel.bench.peers import PEERS
    from diymodel.bench.peers_run import resumed, run

    shapes = parse_shapes(args.shapes)
    chosen = args.peers.split(",") if args.peers else list(PEERS)
    if unknown := [name for name in chosen if name not in PEERS]:
        raise ValueError(f"--peers {','.join(unknown)}: there are {', '.join(PEERS)}")
    if args.batch < 1 or args.prompt < 1:
        raise ValueError(f"--batch {args.batch} --prompt {args.prompt}: at least one prompt of one token")
    if args.resume and args.json is None:
        raise ValueError("--resume goes on with a file: name it with --json FILE")
    device, dtype, effort, document = _begin(args, rounds=25, seconds=60)
    document |= {"prompt": args.prompt, "batch": args.batch, "compiled": args.compiled, "shapes": {}}
    if args.resume and args.json.exists():
        document = resumed(args.json, document)
    run(document, shapes, chosen, device, dtype, effort, args.json)
    return 0


def _add_prefill(kinds: Any) -> None:
    parser = _measurement(kinds, "prefill", _prefill, "a prompt read at once, of growing length: tokens/s and FLOPs")
    parser.add_argument("--shape", choices=SHAPES, default="S", help="(default: %(default)s)")
    parser.add_argument("--lengths", default=_LENGTHS, metavar="N,N,…", help="prompts (default: %(default)s)")


def _prefill(args: argparse.Namespace) -> int:
    from diymodel.bench.prefill import run

    device, dtype, effort, document = _begin(args, rounds=15, seconds=15)
    config = SHAPES[args.shape]
    lengths = parse_lengths("--lengths", args.lengths, config.max_seq_len)
    document |= {"shape": args.shape, "config": _config(config), "lengths": lengths}
    run(document, config, lengths, device, dtype, effort, args.json)
    return 0


def _add_training(kinds: Any) -> None:
    parser = _measurement(
        kinds, "training", _training, "a training step: float32, bfloat16 autocast, compiled, beside transformers"
    )
    parser.add_argument("--shape", choices=SHAPES, default="S", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a row (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="compiled steps as well: a minute or two each on a CPU")


def _training(args: argparse.Namespace) -> int:
    from diymodel.bench.training import run

    if args.batch < 1 or args.length < 2:
        raise ValueError(f"--batch {args.batch} --length {args.length}: at least one row of two tokens")
    device, _, effort, document = _begin(args, rounds=15, seconds=120)
    config = SHAPES[args.shape]
    document |= {"shape": args.shape, "config": _config(config), "batch": args.batch, "length": args.length}
    run(document, config, (args.batch, args.length), device, effort, args.compiled, args.json)
    return 0


def _add_harness(kinds: Any) -> None:
    parser = _measurement(
        kinds, "harness", _harness, "what verifying costs: seconds of a run, trials a second, the pytest plugin"
    )
    parser.add_argument("subjects", nargs="*", help="what diymodel verify takes (default: our own model)")


def _harness(args: argparse.Namespace) -> int:
    from diymodel.bench.harness import run

    _, _, _, document = _begin(args, rounds=1, seconds=1)
    run(document, args.subjects or ["diymodel"], args.quick, args.json)
    return 0


# -------------------------------------------------------------------------------------------------- what is made of it


def _add_plot(kinds: Any) -> None:
    parser = kinds.add_parser(
        "plot",
        help="draw what bench decode measured, log-log",
        description="Draw results of `diymodel bench decode` side by side: a step above, a generation below. A hollow "
        "point was not generated: it is the sum of measured steps. The dashed lines are slopes to compare with; where "
        "they stand means nothing. The ground is transparent: it reads on a light page and on a dark one.",
    )
    parser.set_defaults(command=_plot)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="files that bench decode wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write: .svg, .png …")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the labels (default: en)")


def _plot(args: argparse.Namespace) -> int:
    from diymodel.bench.plot import draw
    from diymodel.bench.results import read_results

    draw([read_results(path, "decode") for path in args.results], args.out, args.lang)
    return 0


def _add_compare(kinds: Any) -> None:
    parser = kinds.add_parser(
        "compare",
        help="hold a new result against an old one",
        description="FLOPs, KV bytes and the exponents of FLOPs are compared exactly: exit code 1 if one has grown, or "
        "is gone. Seconds of two runs are not compared, since machines differ from hour to hour; shown are the ratios "
        "that each file took in turn, with their quartiles.",
    )
    parser.set_defaults(command=_compare)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")


def _compare(args: argparse.Namespace) -> int:
    from diymodel.bench.compare import compare
    from diymodel.bench.results import read_results

    comparison = compare(read_results(args.old), read_results(args.new))
    print("\n".join(comparison.lines()))
    return 1 if comparison.regressions else 0


# ------------------------------------------------------------------------------------------------------ common to many


def _measurement(kinds: Any, name: str, run: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
    """A subcommand with the options that every measurement has."""
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=what, description=f"Measure {what}.")
    parser.set_defaults(command=run)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: on one thread (default: cpu)")
    if name not in ("training", "harness"):
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document there as well")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the seconds mean nothing")
    return parser


def _begin(
    args: argparse.Namespace, rounds: int, seconds: float
) -> tuple[torch.device, torch.dtype, Effort, dict[str, Any]]:
    """Device, dtype and effort of a run, and the head of its document."""
    from diymodel._machine import describe_machine
    from diymodel.bench.device import choose
    from diymodel.bench.results import SCHEMA
    from diymodel.bench.timing import Effort

    if args.json is not None:
        require_place(args.json)
    name = getattr(args, "dtype", "float32")
    device, dtype = choose(args.device, name)
    effort = Effort.quick() if args.quick else Effort(rounds=rounds, seconds=seconds)
    document = {
        "schema": SCHEMA,
        "benchmark": args.bench_name,
        "machine": describe_machine(device),
        "device": args.device,
        "dtype": name,
        "quick": args.quick,
    }
    return device, dtype, effort, document


def _where(document: dict[str, Any]) -> str:
    return str(document["machine"]["gpu"] or document["machine"]["cpu"])


def _config(config: Any) -> dict[str, Any]:
    """The sizes, for a results file."""
    return dict(sorted(vars(config).items()))
