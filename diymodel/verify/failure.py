"""What a check can say besides "passed": it failed, it does not apply, or the effect is too small to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class CheckFailure(AssertionError):
    """A property is refuted.

    ``message`` says what was expected, what was seen, and where first. ``max_abs_diff`` and ``tolerance`` are None
    where the property is no comparison of numbers.
    """

    message: str
    max_abs_diff: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        return self.message


class NotApplicable(Exception):
    """The subject lacks what the check needs, or promises nothing about it; the text is the reason."""


class Inconclusive(Exception):
    """A violation could not have been told from rounding; the text says why."""


class SubjectError(ValueError):
    """The subject cannot be found, built or called; the text is one line for its author."""


def said(error: Exception) -> str:
    """A stranger's error in one line, or ours about the subject as it is."""
    if isinstance(error, SubjectError):
        return str(error)
    first, *more = [line.strip() for line in str(error).splitlines()] or [""]
    if first.endswith(":") and more:
        first = f"{first} {more[0]}"
    return f"{type(error).__name__}: {first}"


def refusal(call: Callable[..., object], *arguments: Any) -> str | None:
    """What a stranger's code says against a call; None: nothing."""
    try:
        call(*arguments)
    except Exception as error:  # it may raise anything
        return said(error)
    return None
