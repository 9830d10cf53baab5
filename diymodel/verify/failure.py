"""What a check can say besides "passed": it failed, it does not apply, or the effect is too small to tell."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARNESS = f"{Path(__file__).parent}{os.sep}"  # what its files begin with
_SHARED = tuple(str(Path(__file__).parents[1] / name) for name in ("counting.py", "_compat.py"))  # with our own model
_STANDARD_LIBRARY = f"{sysconfig.get_path('stdlib')}{os.sep}"
_LIBRARIES = "site-packages/"
_SHOWN = 4  # names of parts or parameters
_TOOLS = ("site-packages/torch/", "site-packages/hypothesis/")


@dataclass
class CheckFailure(AssertionError):
    """A property is refuted.

    ``message`` says what was expected, what was seen, and where first. ``max_abs_diff`` and ``tolerance`` are None
    where the property is no comparison of numbers; ``causes`` where they are not those that the check names;
    ``within_float32`` where rounding to float32 would explain the difference, in a module that does that;
    ``not_finite`` where the property is that plain logits are numbers at all.
    """

    message: str
    max_abs_diff: float | None = None
    tolerance: float | None = None
    causes: tuple[str, ...] | None = None
    within_float32: bool = False
    not_finite: bool = False

    def __str__(self) -> str:
        return self.message


class NotApplicable(Exception):
    """The subject lacks what the check needs, or promises nothing about it; the text is the reason."""


class Inconclusive(Exception):
    """A violation could not have been told from rounding; the text says why."""


class SubjectError(ValueError):
    """The subject cannot be found, built or called; the text is one line for its author."""


def told_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers in three digits, or in as many as show that they differ."""
    texts = ((f"{one:.{digits}g}", f"{other:.{digits}g}") for digits in range(3, 18))
    return next((pair for pair in texts if pair[0] != pair[1]), (f"{one:.3g}", f"{other:.3g}"))


def first_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def said(error: Exception) -> str:
    """A stranger's error in one line, or ours about the subject as it is."""
    if isinstance(error, SubjectError):
        return str(error)
    first, *more = [line.strip() for line in str(error).splitlines()] or [""]
    if first.endswith(":") and more:
        first = f"{first} {more[0]}"
    if not first and (frame := _own_frame(error)):
        first = frame.line or ""  # of a bare assert it is all there is
    return f"{type(error).__name__}: {first}"


def said_where(error: Exception) -> str:
    """:func:`said`, and the line of a stranger's own file that it comes from."""
    frame = None if isinstance(error, SubjectError) else _own_frame(error)
    if frame is None:
        return said(error)
    return f"{said(error)} ({_place(frame)})"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename.removeprefix(f'{Path.cwd()}/')}:{frame.lineno}"


def own_line() -> str | None:
    """The line of a stranger's own file that is being run, and where it is; None where none is."""
    frame = _own([frame for frame in traceback.extract_stack() if not is_a_tools(frame)])
    return frame and f"`{frame.line}` ({_place(frame)})"


def began(error: Exception) -> bool:
    """Whether an error came out of a stranger's function, rather than of the attempt to call it."""
    return isinstance(error, SubjectError) or _own_frame(error) is not None


def crashed(error: Exception) -> bool:
    """Whether an error is a mistake in a stranger's function, rather than its refusal of what it was given.

    A refusal is a statement of its own or of a library that it calls.
    """
    if not began(error) or isinstance(error, (SubjectError, NotImplementedError)):
        return False
    *_, deepest = _not_tools(error)
    return not (deepest.line or "").startswith(("raise", "assert"))


def says_not_implemented(error: Exception) -> bool:
    """Whether a stranger's code says, in words, that it does not do what it was asked for."""
    frames = _not_tools(error)
    raised = bool(frames) and (frames[-1].line or "").startswith("raise")
    return isinstance(error, NotImplementedError) and bool(str(error)) and raised


def is_a_tools(frame: traceback.FrameSummary) -> bool:
    """Whether a line of a traceback lies in the harness, in torch, in Hypothesis or in Python itself."""
    file = frame.filename
    standard_library = file.startswith(_STANDARD_LIBRARY) and _LIBRARIES not in file
    ours = file.startswith(HARNESS) or file in _SHARED
    return standard_library or ours or any(part in file for part in _TOOLS)


def _not_tools(error: Exception) -> list[traceback.FrameSummary]:
    return [frame for frame in traceback.extract_tb(error.__traceback__) if not is_a_tools(frame)]


def _own_frame(error: Exception) -> traceback.FrameSummary | None:
    return _own(_not_tools(error))


def _own(frames: list[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The deepest that is no tool's; of a library's only where no other is."""
    own = [frame for frame in frames if _LIBRARIES not in frame.filename]
    return next(reversed(own or frames), None)


def refusal(call: Callable[..., object], *arguments: Any) -> str | None:
    """What a stranger's code says against a call; None: nothing."""
    try:
        call(*arguments)
    except Exception as error:  # it may raise anything
        return said(error)
    return None
