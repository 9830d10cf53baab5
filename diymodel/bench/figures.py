"""Figures made of many: the middle of repeated timings, ratios taken round by round, and fitted exponents.

Needs no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The middle half of a set of figures."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)

    @classmethod
    def read(cls, stored: Mapping[str, float]) -> Spread:
        """As a results file holds it."""
        return cls(stored["median"], stored["q1"], stored["q3"])

    def text(self) -> str:
        """``1.87 [1.84–1.91]``."""
        return f"{self.median:.2f} [{self.q1:.2f}–{self.q3:.2f}]"


@dataclass(frozen=True)
class Fit:
    """``y ∝ x^exponent``, by least squares on the logarithms."""

    exponent: float
    local: list[float]  # between each two neighbouring points

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        """The fit through at least two points whose coordinates are above 0."""
        log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
        points = itertools.pairwise(zip(log_x, log_y, strict=True))
        local = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in points]
        return cls(statistics.linear_regression(log_x, log_y).slope, local)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the ratio within each round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def seconds_text(seconds: float) -> str:
    """Seconds with three digits and a unit, for a table."""
    if seconds >= 1000:
        return f"{seconds:.0f} s"
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"
