"""Decoding without a cache against decoding with one: what a step costs at t positions, and what T tokens cost.

``python -m benchmarks.decode_scaling [--device cpu|cuda] [--shape S] [--lengths 32,64,…] …``

The theory, counted in multiplications and additions: without a cache the step at t positions computes all of them
again, linear·t + attention·t²; with one it computes a single position, linear + attention·t. Summed over T tokens that
is T² and T³ without, T and T² with. FLOPs are counted exactly and are the proof; seconds are what a machine makes of
them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import (
    Effort,
    Fit,
    Spread,
    Work,
    describe_machine,
    finish,
    interleave,
    parser,
    seconds_text,
    start,
    timed,
)
from benchmarks.shapes import build, describe_shape, parse_shapes, random_ids
from diymodel import DIYConfig, DIYForCausalLM

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
WAYS = {"no_cache": "without cache", "cached": "with cache"}
_ANCHORS = (1, 2, 3)  # lengths that determine a cost of degree 2; every other length counted then checks it


@dataclass(frozen=True)
class StepCost:
    """One decode step: FLOPs of its two kinds, and the cache it leaves."""

    linear: int  # products with weights
    attention: int  # queries by keys, weights by values
    kv_bytes: int

    @property
    def flops(self) -> int:
        return self.linear + self.attention


@torch.inference_mode()
def count_step(config: DIYConfig, length: int, use_cache: bool, dtype: torch.dtype = torch.float32) -> StepCost:
    """Count the step that sees ``length`` positions, the new one included; nothing is computed.

    On the meta device and under the math backend: the counter knows no flash attention of the CPU.
    """
    with torch.device("meta"):
        model = DIYForCausalLM(config).to(dtype).eval()
        ids = torch.zeros(1, length, dtype=torch.int64)
    past = None
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        if not use_cache:
            with counter:
                model(ids, logits_to_keep=1)
        else:
            if length > 1:
                _, past = model(ids[:, :-1], use_cache=True, logits_to_keep=1)
            with counter:
                _, past = model(ids[:, -1:], past_key_values=past, use_cache=True)
    by_operator = counter.get_flop_counts()["Global"]
    attention = by_operator.get(torch.ops.aten.bmm, 0)  # the weights are two-dimensional: they are multiplied by mm
    kv_bytes = sum(cached[name].nbytes for cached, _ in past for name in ("k", "v")) if past else 0
    return StepCost(sum(by_operator.values()) - attention, attention, kv_bytes)


def count_steps(
    config: DIYConfig, lengths: Sequence[int], use_cache: bool, dtype: torch.dtype = torch.float32
) -> dict[int, StepCost]:
    """The cost of the step at each length, and at the few small ones that :func:`total` needs."""
    return {t: count_step(config, t, use_cache, dtype) for t in sorted({*_ANCHORS, *lengths})}


def total(costs: Mapping[int, int], tokens: int) -> int:
    """The exact sum of the steps at 1, 2, …, ``tokens`` positions.

    A step's cost is a polynomial of degree 2 in its length at most. Three counted steps determine it; all others that
    were counted must lie on it.

    Raises:
        ValueError: they do not, so the sum would be a guess.
    """
    a, b, c = (costs[t] for t in _ANCHORS)

    def cost(t: int) -> Fraction:  # Newton's form through the anchors 1, 2, 3
        return a + (b - a) * (t - 1) + Fraction((c - 2 * b + a) * (t - 1) * (t - 2), 2)

    for t, counted in costs.items():
        if cost(t) != counted:
            raise ValueError(f"the step at {t} positions costs {counted} FLOPs and not {cost(t)}: no polynomial in it")
    return int(sum(cost(t) for t in range(1, tokens + 1)))


def uncached_step(model: DIYForCausalLM, ids: Tensor) -> Work:
    """Compute the whole sequence again for the logits of its last position."""
    return Work(lambda: model(ids, logits_to_keep=1))


def cached_step(model: DIYForCausalLM, ids: Tensor) -> Work:
    """Compute one position on the cache of the others.

    A few steps follow one another, so that each continues the newest cache, as in a generation; they stand around the
    length asked for. Starting again branches off from the same prefix.
    """
    length = ids.shape[1]
    steps = max(1, min(16, length // 4))
    token = ids[:, :1].clone()
    _, prefix = model(ids[:, : max(1, length - steps // 2 - 2)], use_cache=True, logits_to_keep=1)
    past: Any = None

    def step() -> None:
        nonlocal past
        _, past = model(token, past_key_values=past, use_cache=True)

    def branch() -> None:
        nonlocal past
        past = prefix
        step()  # the copy that branching costs is not a step's

    return Work(step, branch, steps)


@torch.inference_mode()
def time_steps(
    model: DIYForCausalLM, lengths: Sequence[int], device: torch.device, effort: Effort
) -> dict[int, dict[str, Spread]]:
    """Seconds of the step at each length, both ways in turn."""
    times = {}
    for length in lengths:
        ids = random_ids(model.config, 1, length, device)
        works = {"no_cache": uncached_step(model, ids), "cached": cached_step(model, ids)}
        times[length] = {way: Spread.of(rounds) for way, rounds in interleave(works, device, effort).items()}
    return times


def integral(step_seconds: Mapping[int, float], tokens: int) -> float:
    """The sum of the steps at 1, 2, …, ``tokens`` positions, from steps measured at some lengths.

    Straight lines in between; before the first length, its own value, which is the upper side.
    """
    lengths = sorted(step_seconds)

    def at(t: int) -> float:
        i = bisect.bisect_left(lengths, t)
        if i == 0 or lengths[i] == t:
            return step_seconds[lengths[i]]
        low, high = lengths[i - 1], lengths[i]
        share = (t - low) / (high - low)
        return (1 - share) * step_seconds[low] + share * step_seconds[high]

    return sum(at(t) for t in range(1, tokens + 1))


def time_total(
    model: DIYForCausalLM, tokens: int, use_cache: bool, expected: float, device: torch.device, affordable: float
) -> dict[str, Any]:
    """Seconds to generate ``tokens`` tokens from a prompt of one: generated where affordable, else as expected."""
    if expected > affordable:
        return {"seconds": expected, "generated": False}
    prompt = random_ids(model.config, 1, 1, device)
    times = 1 if expected > affordable / 10 else 3
    seconds = [timed(lambda: model.generate(prompt, tokens, use_cache=use_cache), device) for _ in range(times)]
    return {"seconds": Spread.of(seconds).median, "generated": True}


def measure(
    config: DIYConfig,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    affordable: float,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """All rows and fits of one shape; ``report`` is called with each row as it is done."""
    costs = {way: count_steps(config, lengths, way == "cached", dtype) for way in WAYS}
    model = build(config).to(device, dtype)
    times = time_steps(model, lengths, device, effort)
    rows = []
    for length in lengths:
        row: dict[str, Any] = {"length": length}
        for way in WAYS:
            cost = costs[way][length]
            step = {t: times[t][way].median for t in lengths}
            generation = time_total(model, length, way == "cached", integral(step, length), device, affordable)
            row[way] = {
                "step_seconds": times[length][way],
                "step_flops": cost.flops,
                "step_linear_flops": cost.linear,
                "step_attention_flops": cost.attention,
                "kv_bytes": cost.kv_bytes,
                "total_seconds": generation["seconds"],
                "total_generated": generation["generated"],
                "tokens_per_second": length / generation["seconds"],
                **{f"total_{kind}": flops for kind, flops in total_flops(costs[way], length).items()},
            }
        report(row)
        rows.append(row)
    return {"rows": rows, "fits": fits(rows), "attention_overtakes_at": overtakes(costs["cached"])}


def total_flops(costs: Mapping[int, StepCost], tokens: int) -> dict[str, int]:
    """FLOPs of a generation from a prompt of one token: of all its steps, and of their two kinds."""
    linear = total({t: cost.linear for t, cost in costs.items()}, tokens)
    attention = total({t: cost.attention for t, cost in costs.items()}, tokens)
    return {"flops": linear + attention, "linear_flops": linear, "attention_flops": attention}


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Fit]]:
    """Exponents over the lengths, with the slopes between each two."""
    quantities = ("step_flops", "step_seconds", "total_flops", "total_linear_flops", "total_attention_flops")
    lengths = [row["length"] for row in rows]
    found: dict[str, dict[str, Fit]] = {}
    for way in WAYS:
        found[way] = {}
        for quantity in (*quantities, "total_seconds"):
            values = [row[way][quantity] for row in rows]
            found[way][quantity] = Fit.of(lengths, [v.median if isinstance(v, Spread) else v for v in values])
    return found


def overtakes(cached: Mapping[int, StepCost]) -> float:
    """Positions from which a cached step spends more on attention than on products with weights.

    About 6 · hidden_size where every query head has its own keys, and a little more for the head over the vocabulary.
    """
    return cached[1].linear / cached[1].attention


def print_row(row: Mapping[str, Any]) -> None:
    """One length, both ways, as a row of the table."""
    cells = [f"{row['length']:>6}"]
    for way in WAYS:
        r = row[way]
        mark = " " if r["total_generated"] else "*"
        cells.append(
            f"{seconds_text(r['step_seconds'].median):>8} {r['step_flops']:>8.2g} "
            f"{seconds_text(r['total_seconds']):>8}{mark} {r['total_flops']:>8.2g} {r['tokens_per_second']:>8.3g}"
        )
    cells.append(f"{row['cached']['kv_bytes'] / 2**20:>8.3g}")
    print(" | ".join(cells), flush=True)


def print_fits(result: Mapping[str, Any]) -> None:
    """The exponents below the table."""
    print("\nexponents over these lengths [slope between each two]")
    for way, title in WAYS.items():
        for quantity, fit in result["fits"][way].items():
            local = " ".join(f"{slope:.2f}" for slope in fit.local)
            print(f"  {title:<14} {quantity.replace('_', ' '):<22} {fit.exponent:5.2f}  [{local}]")
    positions = result["attention_overtakes_at"]
    print(f"from {positions:.0f} positions on, a cached step spends more on attention than on products with weights")


def _parse_lengths(text: str, config: DIYConfig) -> list[int]:
    lengths = sorted({int(word) for word in text.split(",")})
    if len(lengths) < 2 or lengths[0] < 4 or lengths[-1] > config.max_seq_len - 16:
        raise ValueError(f"--lengths {text}: at least two, from 4 to {config.max_seq_len - 16}")
    return lengths


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shape", default="S", help="shape to measure")
    options.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="positions, in increasing order")
    options.add_argument(
        "--affordable", type=float, default=60.0, metavar="SECONDS", help="generations longer than this are not run"
    )
    args = options.parse_args(argv)
    device, dtype = start(options, args)
    try:
        if "," in args.shape:
            raise ValueError(f"--shape {args.shape}: one shape at a time")
        ((name, config),) = parse_shapes(args.shape).items()
        lengths = _parse_lengths(args.lengths, config)
    except ValueError as error:
        options.error(str(error))
    document: dict[str, Any] = {
        "schema": 1,
        "benchmark": "decode_scaling",
        "machine": describe_machine(device),
        "device": args.device,
        "dtype": args.dtype,
        "quick": args.quick,
        "shape": name,
        "config": describe_shape(config),
    }
    print(f"shape {name}, {args.dtype}, {document['machine']['gpu'] or document['machine']['cpu']}")
    one_way = f"{'step':>8} {'FLOPs':>8} {'total':>9} {'FLOPs':>8} {'tokens/s':>8}"
    print(f"{'':>6} | {WAYS['no_cache']:^{len(one_way)}} | {WAYS['cached']:^{len(one_way)}} |")
    print(f"{'length':>6} | {one_way} | {one_way} | {'KV MiB':>8}")
    effort = Effort.quick() if args.quick else Effort(rounds=15, seconds=20)
    affordable = min(args.affordable, 1.0) if args.quick else args.affordable
    result = measure(config, lengths, device, dtype, effort, affordable, print_row)
    if not all(row[way]["total_generated"] for row in result["rows"] for way in WAYS):
        print("* not generated: the integral of the measured steps")
    print_fits(result)
    finish(document | result, args.json)


if __name__ == "__main__":
    main()
