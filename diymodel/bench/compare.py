"""Two results of one benchmark: what is exact is held exactly, what is timed is only shown.

Exact are FLOPs, bytes of the cache and the exponents of FLOPs: they are the same on every machine. More of them is a
regression, and so is one that is gone. Seconds of two runs say little, for machines differ from hour to hour; a ratio
that was taken in turn within one run says more, so these are shown, with their quartiles. Needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from diymodel.bench.figures import Spread

_SAME = ("benchmark", "subject", "shape", "config", "dtype", "prompt", "batch", "length")  # or nothing is comparable
_EXACT = ("flops", "kv_bytes")  # how the names of exact figures end
_EXPONENT_ROUNDING = 1e-9


@dataclass
class Comparison:
    """What differs, a line each."""

    regressions: list[str] = field(default_factory=list)
    improvements: list[str] = field(default_factory=list)
    ratios: list[str] = field(default_factory=list)
    num_exact: int = 0  # figures that were held against each other

    def lines(self) -> list[str]:
        """All of it, for a terminal."""
        lines = [f"regression: {line}" for line in self.regressions]
        lines += [f"less than before: {line}" for line in self.improvements]
        changed = len(self.regressions) + len(self.improvements)
        lines.append(f"{self.num_exact} exact figures, {changed} differ")
        if self.ratios:
            lines.append("ratios taken in turn, OLD → NEW, medians [quartiles]; no verdict hangs on them:")
            lines += [f"  {line}" for line in self.ratios]
        return lines


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Hold a result against an earlier one of the same benchmark, subject, sizes and dtype.

    Raises:
        ValueError: they measured different things; the message says which.
    """
    for key in _SAME:
        if old.get(key) != new.get(key):
            raise ValueError(
                f"OLD has {key} {old.get(key)!r} and NEW {new.get(key)!r}: they measured different things, so neither "
                "is better or worse"
            )
    comparison = Comparison()
    before, after = dict(_exact(old)), dict(_exact(new))
    for name, value in before.items():
        if name not in after:
            comparison.regressions.append(f"{name} is gone, it was {value:,}")
            continue
        comparison.num_exact += 1
        now = after[name]
        if abs(now - value) <= _EXPONENT_ROUNDING * abs(value):
            continue
        (comparison.regressions if now > value else comparison.improvements).append(f"{name}: {value:,} → {now:,}")
    verdicts = [result.get("cache", {}).get("verdict") for result in (old, new)]
    if verdicts[0] == "constant" and verdicts[1] != "constant":
        comparison.regressions.append(f"the cache: {verdicts[0]} → {verdicts[1]}: {new['cache']['reason']}")
    old_ratios, new_ratios = dict(_ratios(old)), dict(_ratios(new))
    for name in (name for name in old_ratios if name in new_ratios):
        a, b = old_ratios[name], new_ratios[name]
        apart = "apart" if a.q3 < b.q1 or b.q3 < a.q1 else "within their spread"
        comparison.ratios.append(f"{name}: {a.text()} → {b.text()}  {apart}")
    return comparison


def _exact(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every figure that is the same on all machines."""
    for path, value in _leaves(document):
        if path[0] == "fits":
            # fits/<way>/<quantity>/exponent of decode, fits/<quantity>/exponent of prefill
            if path[-1] == "exponent" and path[-2].endswith("flops"):
                yield " ".join(path), value
        elif path[-1].endswith(_EXACT) and isinstance(value, int):
            yield " ".join(path), value


def _ratios(document: Mapping[str, Any]) -> Iterator[tuple[str, Spread]]:
    """Name and spread of every ratio that was taken in turn."""
    found = (path[: path.index("ratios") + 2] for path, _ in _leaves(document) if "ratios" in path[:-1])
    for path in dict.fromkeys(found):
        value: Any = document
        for part in path:
            value = _part(value, part)
        yield " ".join(part for part in path if part not in ("rows", "ratios")), Spread.read(value)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every number in nested mappings and rows, with the way to it; rows go by their length, not by their place."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, (*path, str(name)))
    elif isinstance(value, list) and all(isinstance(row, Mapping) and "length" in row for row in value):
        yield from itertools.chain.from_iterable(_leaves(row, (*path, f"length {row['length']}")) for row in value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def _part(value: Any, name: str) -> Any:
    """The part of a mapping, or the row of a list, that :func:`_leaves` calls so."""
    if isinstance(value, list):
        return next(row for row in value if f"length {row['length']}" == name)
    return value[name]
