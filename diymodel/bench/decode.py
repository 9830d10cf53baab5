"""Decoding without a cache against decoding with one: what a step costs at t positions, and what T tokens cost.

The theory stands in :mod:`diymodel.bench.scaling`. FLOPs are counted exactly and are the proof; seconds are what a
machine makes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.bandwidth import matrix_vector_products, measured_bandwidth, read_bytes, share_of_bound
from diymodel.bench.caches import ConcatenatedDecoder, MaskedDecoder
from diymodel.bench.compiled import ENGINES, engine_decoder, missing
from diymodel.bench.decoders import Benched, Decoder, OwnDecoder, greedy, random_ids
from diymodel.bench.figures import Spread, ratios
from diymodel.bench.memory import peak_bytes
from diymodel.bench.scaling import (
    THEORY,
    StepCost,
    count_step,
    count_steps,
    fits,
    integral,
    overtakes,
    recomputes,
    total_flops,
)
from diymodel.bench.timing import Effort, Work, interleave, timed
from diymodel.config import DIYConfig

ROOM = 16  # positions that the steps of a round take beyond the longest length
WAYS = {
    "no_cache": "without cache",
    "cached": "with cache",
    "concatenated": "torch.cat cache",
    "masked": "masked buffer",
    **ENGINES,
    "floor": "matrix-vector products alone",
}


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    lengths: Sequence[int]
    prompt: int  # tokens before the first that is generated
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    affordable: float  # seconds; longer generations are not run
    engines: Sequence[str] = ()  # of ENGINES, for our own model

    @property
    def capacity(self) -> int:
        """Positions that a buffer of fixed length holds."""
        return max(*self.lengths, self.prompt) + ROOM


Counts = dict[str, dict[int, StepCost]]


def measure(
    subject: Benched,
    plan: Plan,
    report: Callable[[Mapping[str, Any]], object],
    progress: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """All rows and fits of one subject: a part of the results file.

    Args:
        report: called with each row as it is done.
        progress: called with what comes next.

    Raises:
        ValueError: the subject cannot be built in these sizes, or refuses even two of the lengths.
    """
    skipped = {"cached": subject.no_cache_reason} if subject.no_cache_reason else {}
    if subject.always_cached:
        skipped["no_cache"] = "there is no call without the cache"
    progress("counting FLOPs")
    counts, lengths, where = count(subject, plan, [way for way in ("no_cache", "cached") if way not in skipped])
    prefills = {plan.prompt: _prefill_cost(subject, plan, counts, where)}
    decoders = _decoders(subject, plan, skipped)
    times, peaks = time_steps(decoders, lengths, plan, subject.config.vocab_size, progress)
    weights = next(iter(decoders.values())).module
    bandwidth = measured_bandwidth(plan.device)
    rows = []
    for length in lengths:
        progress(f"generating {length} tokens")
        row: dict[str, Any] = {"length": length}
        for way in times[length]:
            seconds = {t: Spread.of(times[t][way]).median for t in lengths}
            cost = counts.get(way.split("_")[0] if way in ENGINES else way)
            row[way] = {"step_seconds": Spread.of(times[length][way])}
            if way in peaks[length]:
                row[way]["step_peak_bytes"] = peaks[length][way]
            if way == "floor":
                continue
            row[way] |= _total_seconds(decoders[way], way, seconds, length, plan, subject.config.vocab_size)
            if cost is not None:
                row[way] |= _counted(cost, prefills[plan.prompt], way, length, plan.prompt)
            if way != "no_cache":
                read = read_bytes(weights, row[way].get("kv_bytes") or 0)
                row[way]["share_of_bandwidth_bound"] = share_of_bound(read, bandwidth, seconds[length])
        ours = times[length].get("cached")
        others = [way for way in times[length] if way != "cached"] if ours else []
        row["ratios"] = {f"{way}/cached": ratios(times[length][way], ours or []) for way in others}
        report(row)
        rows.append(row)
    ways = [way for way in WAYS if way in rows[0]]
    cached = counts.get("cached")
    return {
        "lengths": list(lengths),
        "prompt": plan.prompt,
        "weight_bytes": sum(parameter.nbytes for parameter in weights.parameters()),
        "bandwidth_bytes_per_second": bandwidth,
        "counted_on": where.type,
        "skipped": skipped,
        "cache": _verdict(subject, cached, lengths),
        "theory": THEORY,
        "attention_overtakes_at": overtakes(cached) if cached else None,
        "attention_overtakes_in_theory": _overtakes_in_theory(subject.config) if subject.is_own else None,
        "rows": rows,
        "fits": fits(rows, ways),
    }


def count(subject: Benched, plan: Plan, ways: Sequence[str]) -> tuple[Counts, list[int], torch.device]:
    """FLOPs, cache and memory of each way's steps, the lengths that the subject takes, and where it was counted.

    On the meta device, where nothing is computed; on the CPU for a module that looks at values.

    Raises:
        ValueError: the subject refuses even two of the lengths.
    """
    try:
        return _count(subject, plan, ways, torch.device("meta"))
    except Exception:  # a stranger's module may do anything with a tensor that holds nothing
        return _count(subject, plan, ways, torch.device("cpu"))


def _count(
    subject: Benched, plan: Plan, ways: Sequence[str], device: torch.device
) -> tuple[Counts, list[int], torch.device]:
    decoder = subject.decoder(device, plan.dtype)
    lengths = _accepted(decoder, plan.lengths, ways) if device.type != "meta" else list(plan.lengths)
    counts = {way: count_steps(decoder, lengths, way == "cached") for way in ways}
    if isinstance(decoder, OwnDecoder):
        others = {"concatenated": ConcatenatedDecoder(decoder.module)}
        counts |= {way: count_steps(other, lengths, use_cache=True) for way, other in others.items()}
        counts["masked"] = count_steps(MaskedDecoder(decoder.module, plan.capacity), lengths, use_cache=True)
    return counts, lengths, device


@torch.no_grad()
def _accepted(decoder: Decoder, lengths: Sequence[int], ways: Sequence[str]) -> list[int]:
    """The lengths that the module takes, from the shortest on."""
    accepted: list[int] = []
    for length in lengths:
        ids = torch.zeros(1, length, dtype=torch.int64)
        try:
            decoder.whole(ids) if "no_cache" in ways else decoder.extend(ids, None)
        except Exception as error:  # a stranger's module refuses as it likes
            if len(accepted) < 2:
                raise ValueError(
                    f"the subject does not take {length} positions ({type(error).__name__}: {error}), and growth needs "
                    "two lengths: choose shorter ones with --lengths, or a --shape that it takes"
                ) from error
            break
        accepted.append(length)
    return accepted


def _prefill_cost(subject: Benched, plan: Plan, counts: Counts, where: torch.device) -> StepCost:
    """Of a prompt: one uncached step at its length, or where there is none the filling of an empty cache."""
    uncached = counts.get("no_cache", {})
    if plan.prompt in uncached:
        return uncached[plan.prompt]
    return count_step(subject.decoder(where, plan.dtype), plan.prompt, use_cache=not uncached)


def _decoders(subject: Benched, plan: Plan, skipped: dict[str, str]) -> dict[str, Decoder]:
    """What is timed, by way; what cannot be is added to ``skipped`` with the reason."""
    decoder = subject.decoder(plan.device, plan.dtype)
    decoders = {way: decoder for way in ("no_cache", "cached") if way not in skipped}
    if isinstance(decoder, OwnDecoder):
        decoders["concatenated"] = ConcatenatedDecoder(decoder.module)
        decoders["masked"] = MaskedDecoder(decoder.module, plan.capacity)
        for engine in plan.engines:
            reason = missing(engine, plan.device)
            if reason is None:
                decoders[engine] = engine_decoder(engine, decoder.module, plan.capacity)
            else:
                skipped[engine] = reason
    return decoders


@torch.inference_mode()
def time_steps(
    decoders: Mapping[str, Decoder],
    lengths: Sequence[int],
    plan: Plan,
    vocab_size: int,
    progress: Callable[[str], object] = lambda text: None,
) -> tuple[dict[int, dict[str, list[float]]], dict[int, dict[str, int]]]:
    """Seconds of the step at each length, all ways in turn, for each one figure a round; and the bytes it takes."""
    times, peaks = {}, {}
    floor = matrix_vector_products(next(iter(decoders.values())).module)
    for length in lengths:
        progress(f"timing steps at {length} positions")
        ids = random_ids(vocab_size, 1, length, plan.device)
        works = {
            way: uncached_step(decoder, ids) if way == "no_cache" else cached_step(decoder, ids)
            for way, decoder in decoders.items()
        }
        times[length] = interleave(works | {"floor": Work(floor)}, plan.device, plan.effort)
        peaks[length] = {way: step_peak(work, plan.device) for way, work in works.items() if way not in ENGINES}
    return times, peaks


def step_peak(work: Work, device: torch.device) -> int:
    """Bytes that a step takes at most; of those that follow one another, the middle one, which is at the length."""
    if work.reset is not None:
        work.reset()
        for _ in range(work.most_calls // 2):
            work.run()
    return peak_bytes(work.run, device)


def uncached_step(decoder: Decoder, ids: Tensor) -> Work:
    """Compute the whole sequence again for the logits of its last position."""
    return Work(lambda: decoder.whole(ids))


def cached_step(decoder: Decoder, ids: Tensor) -> Work:
    """Compute one position on the cache of the others.

    A few steps follow one another, so that each continues the newest cache, as in a generation; they stand around the
    length asked for. Starting again branches off from the same prefix, where a cache allows that, and fills a new one
    where it does not.
    """
    length = ids.shape[1]
    steps = max(1, min(ROOM, length // 4))
    token = ids[:, :1].clone()
    prefix_ids = ids[:, : max(1, length - steps // 2 - 2)]

    def fill() -> Any:
        return decoder.extend(prefix_ids, None)[1]

    prefix = functools.cache(fill) if decoder.is_value else fill
    past: Any = None

    def step() -> None:
        nonlocal past
        _, past = decoder.extend(token, past)

    def branch() -> None:
        nonlocal past
        past = prefix()
        step()  # the copy that branching costs is not a step's

    return Work(step, branch, steps)


def _total_seconds(
    decoder: Decoder, way: str, steps: Mapping[int, float], tokens: int, plan: Plan, vocab_size: int
) -> dict[str, Any]:
    """Seconds to generate ``tokens`` tokens: generated where affordable, else the sum of the measured steps."""
    expected = integral(steps, plan.prompt, plan.prompt + tokens - 1)
    seconds, generated = expected, way in ("no_cache", "cached") and expected <= plan.affordable
    if generated:
        prompt = random_ids(vocab_size, 1, plan.prompt, plan.device)
        run = functools.partial(greedy, decoder, prompt, tokens, way == "cached")
        times = 1 if expected > plan.affordable / 10 else 3
        with torch.inference_mode():
            seconds = Spread.of([timed(run, plan.device) for _ in range(times)]).median
    return {"total_seconds": seconds, "total_generated": generated, "tokens_per_second": tokens / seconds}


def _counted(
    costs: Mapping[int, StepCost], prefill: StepCost, way: str, length: int, prompt: int
) -> dict[str, int | bool | None]:
    cost = costs[length]
    totals = total_flops(costs, None if way == "no_cache" else prefill, prompt, length)
    return {
        "step_flops": cost.flops.total,
        "step_linear_flops": cost.flops.linear,
        "step_attention_flops": cost.flops.attention,
        "kv_bytes": cost.kv_bytes,
        **{f"total_{kind}": value for kind, value in totals.items()},
    }


def _overtakes_in_theory(config: DIYConfig) -> float:
    """In Llama's architecture: 6 · hidden_size for the blocks, and what the head over the vocabulary adds."""
    return 6 * config.hidden_size + config.vocab_size / (2 * config.num_layers)


def _verdict(subject: Benched, cached: Mapping[int, StepCost] | None, lengths: Sequence[int]) -> dict[str, Any]:
    """Whether the subject's cache is one, judged by FLOPs."""
    if cached is None:
        return {"verdict": "none", "reason": subject.no_cache_reason}
    reason = recomputes(cached, lengths)
    if reason is not None:
        return {"verdict": "recomputes", "reason": reason}
    return {"verdict": "constant", "reason": "a cached step's products with weights are the same at every length"}
