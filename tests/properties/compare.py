"""How a property compares, and what it says when the comparison fails."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Times the largest expected value. In float64, millions of healthy models stayed below 8e-13 and the smallest bug
# stood above 1e-9 (tolerance.md), so there is nothing to tune here: a difference above this is no rounding.
ROUNDING = 1e-11


def require(condition: bool, message: str) -> None:
    """An ``assert`` that ``python -O`` does not remove."""
    if not condition:
        raise AssertionError(message)


def assert_same(
    seen: Tensor, expected: Tensor, what: str, tolerance: float = ROUNDING, scale: float | None = None
) -> None:
    """``seen`` is ``expected`` up to ``tolerance`` times ``scale``, by default the largest expected value."""
    _assert_same_shape(seen, expected, what)
    seen, expected = seen.detach(), expected.detach()
    if not expected.numel():
        return
    allowed = tolerance * (float(expected.abs().max()) if scale is None else scale)
    difference = (seen.double() - expected.double()).abs()
    _assert_nowhere(~(difference <= allowed), seen, expected, f"{what} (tolerance {allowed:.3g})")  # a NaN is wrong


def assert_identical(seen: Tensor, expected: Tensor, what: str) -> None:
    """``seen`` is ``expected``, bit for bit."""
    _assert_same_shape(seen, expected, what)
    require(seen.dtype == expected.dtype, f"{what}: expected {expected.dtype}, seen {seen.dtype}")
    seen, expected = seen.detach(), expected.detach()
    _assert_nowhere(~(seen == expected), seen, expected, f"{what} (bit for bit)")


def assert_differs(seen: Tensor, other: Tensor, what: str, tolerance: float = ROUNDING) -> None:
    """``seen`` and ``other`` are apart by more than rounding: somewhere in the two, the effect looked for shows."""
    seen, other = seen.detach(), other.detach()
    difference = float((seen - other).abs().max())
    largest = float(other.abs().max())
    require(
        difference > tolerance * largest,
        f"{what}: expected a difference above {tolerance * largest:.3g}, seen {difference:.3g}",
    )


def assert_refused(call: Callable[[], object], mention: str, what: str) -> None:
    """The call raises a ValueError or a RuntimeError whose message contains ``mention``."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        require(mention in str(error), f"{what}: expected a message with {mention!r}, seen {str(error)!r}")
        return
    raise AssertionError(f"{what}: expected an error that mentions {mention!r}, seen none")


def _assert_same_shape(seen: Tensor, expected: Tensor, what: str) -> None:
    require(seen.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, seen {tuple(seen.shape)}")


def _assert_nowhere(wrong: Tensor, seen: Tensor, expected: Tensor, what: str) -> None:
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist()) if wrong.dim() else ()
    names = ("row", "position", "token") if wrong.dim() == 3 else tuple(f"index {i}" for i in range(wrong.dim()))
    where = ", ".join(f"{name} {index}" for name, index in zip(names, first, strict=True)) or "the value"
    largest = float((seen.double() - expected.double()).abs().nan_to_num(torch.inf).max())
    raise AssertionError(
        f"{what}: {where}: expected {expected[first].item():.17g}, seen {seen[first].item():.17g}; "
        f"{int(wrong.sum())} of {wrong.numel()} values are wrong, the largest difference is {largest:.3g}"
    )
