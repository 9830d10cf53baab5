"""How the cost of a decode step grows: FLOPs counted at some lengths, summed exactly over all, and fitted.

The theory, in multiplications and additions: without a cache the step at t positions computes all of them again,
linear·t + attention·t²; with one it computes a single position, linear + attention·t. Summed over T tokens that is T²
and T³ without, T and T² with.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from diymodel.bench.decoders import Decoder, kv_bytes
from diymodel.bench.figures import Fit, Spread
from diymodel.counting import Flops, count_flops

ANCHORS = (2, 3, 4)  # lengths that determine a cost of degree 2; every other length counted then checks it
THEORY = {  # exponents of the totals
    "no_cache": {"linear": 2.0, "attention": 3.0},
    "cached": {"linear": 1.0, "attention": 2.0},
}
_CONSTANT = 0.05  # slope of a step's products with weights up to which they count as the same at every length


@dataclass(frozen=True)
class StepCost:
    """One decode step."""

    flops: Flops
    kv_bytes: int | None  # of the cache that it leaves; None: none, or not found


def count_step(decoder: Decoder, length: int, use_cache: bool) -> StepCost:
    """Count the step that sees ``length`` positions, the new one included."""
    device = next(decoder.module.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    past: Any = None

    def stem() -> Any:
        return decoder.extend(ids[:, :-1], None)[1] if length > 1 else None

    def step() -> None:
        nonlocal past
        if use_cache:
            _, past = decoder.extend(ids[:, -1:], past)
        else:
            decoder.whole(ids)

    with torch.no_grad(), torch.device(device):  # strangers make their masks and positions without saying where
        if use_cache:
            past = stem()
        flops = count_flops(step, decoder.module)
        return StepCost(flops, kv_bytes(decoder.module, past) if use_cache else None)


def count_steps(decoder: Decoder, lengths: Sequence[int], use_cache: bool) -> dict[int, StepCost]:
    """The cost of the step at each length, and at the few small ones that :func:`total` needs."""
    return {t: count_step(decoder, t, use_cache) for t in sorted({*ANCHORS, *lengths})}


def total(costs: Mapping[int, int], first: int, last: int) -> int:
    """The exact sum of the steps at ``first``, …, ``last`` positions.

    A step's cost is a polynomial of degree 2 in its length at most. Three counted steps determine it; all others that
    were counted must lie on it.

    Raises:
        ValueError: they do not, so the sum would be a guess.
    """
    x0, x1, x2 = ANCHORS
    a, b, c = (costs[t] for t in ANCHORS)
    assert (x1 - x0, x2 - x1) == (1, 1)

    def cost(t: int) -> Fraction:  # Newton's form through the anchors
        return a + (b - a) * (t - x0) + Fraction((c - 2 * b + a) * (t - x0) * (t - x1), 2)

    for t, counted in costs.items():
        if cost(t) != counted:
            raise ValueError(f"the step at {t} positions costs {counted} FLOPs and not {cost(t)}: no polynomial in it")
    return int(sum(cost(t) for t in range(first, last + 1)))


def integral(steps: Mapping[int, float], first: int, last: int) -> float:
    """The sum of the steps at ``first``, …, ``last`` positions, from steps known at some lengths.

    Straight lines in between; outside, the nearest value, which is the upper side at the low end.
    """
    lengths = sorted(steps)

    def at(t: int) -> float:
        i = bisect.bisect_left(lengths, t)
        if i == len(lengths):
            return steps[lengths[-1]]
        if i == 0 or lengths[i] == t:
            return steps[lengths[i]]
        low, high = lengths[i - 1], lengths[i]
        share = (t - low) / (high - low)
        return (1 - share) * steps[low] + share * steps[high]

    return sum(at(t) for t in range(first, last + 1))


def total_flops(
    steps: Mapping[int, StepCost], prefill: StepCost | None, prompt: int, tokens: int
) -> dict[str, int | bool]:
    """FLOPs of generating ``tokens`` tokens after a prompt: of all steps, and of their two kinds.

    Args:
        prefill: what the prompt costs, with whose logits the first token comes; None: one step more.

    Returns:
        ``flops``, ``linear_flops``, ``attention_flops``; ``exact`` is False where a step's cost is no polynomial of its
        length, so that straight lines between those that were counted had to do.
    """
    first = prompt if prefill is None else prompt + 1
    last = prompt + tokens - 1
    found: dict[str, int | bool] = {"exact": True}
    for kind in ("linear", "attention"):
        costs = {t: int(getattr(cost.flops, kind)) for t, cost in steps.items()}
        try:
            summed = total(costs, first, last)
        except ValueError:
            found["exact"] = False
            summed = round(integral(costs, first, last))
        found[f"{kind}_flops"] = summed + (0 if prefill is None else int(getattr(prefill.flops, kind)))
    return {"flops": found["linear_flops"] + found["attention_flops"], **found}


def overtakes(cached: Mapping[int, StepCost]) -> float | None:
    """Positions from which a cached step spends more on attention than on products with weights; None: never.

    About 6 · hidden_size where every query head has its own keys, and a little more for the head over the vocabulary.
    """
    low, _, high = ANCHORS
    slope = (cached[high].flops.attention - cached[low].flops.attention) / (high - low)
    return cached[high].flops.linear / slope if slope > 0 else None


def recomputes(cached: Mapping[int, StepCost], lengths: Sequence[int]) -> str | None:
    """What gives away that a "cached" step computes earlier positions again; None where it does not.

    The products with weights of one position are the same however long the cache is.
    """
    linear = [cached[t].flops.linear for t in lengths]
    if min(linear) == 0:
        return None
    slope = Fit.of(lengths, linear).exponent
    if slope <= _CONSTANT:
        return None
    return (
        f"its cached step recomputes: products with weights take {linear[0]:.3g} FLOPs at {lengths[0]} positions and "
        f"{linear[-1]:.3g} at {lengths[-1]}, t^{slope:.2f} where a cached step's are constant"
    )


def fits(rows: Sequence[Mapping[str, Any]], ways: Sequence[str]) -> dict[str, dict[str, Fit]]:
    """Exponents over the lengths, with the slopes between each two, of everything that is above 0."""
    lengths = [row["length"] for row in rows]
    found: dict[str, dict[str, Fit]] = {}
    for way in ways:
        found[way] = {}
        for quantity in (
            *("step_flops", "step_linear_flops", "step_attention_flops", "step_seconds"),
            *("total_flops", "total_linear_flops", "total_attention_flops", "total_seconds"),
        ):
            stored = [row[way].get(quantity) for row in rows]
            values = [value.median if isinstance(value, Spread) else value for value in stored]
            if all(value is not None and value > 0 for value in values):
                found[way][quantity] = Fit.of(lengths, values)
    return found
