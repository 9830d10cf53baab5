"""The list of checks: what each is called, which step of the roadmap it belongs to, and what it needs."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diymodel.verify.trial import Trial

_CHECKS: dict[str, Check] = {}


@dataclass(frozen=True)
class Check:
    """One property of a causal language model."""

    id: str  # area.name, for example decode.cached_equals_full
    title: str  # the property as a sentence
    step: str  # of the roadmap, "1.1" … "5.4"
    needs: tuple[str, ...]  # capabilities; without one of them the check is skipped
    causes: tuple[str, ...]  # slugs of bug classes, the likeliest first
    function: Callable[[Trial], None]  # one trial; raises CheckFailure
    optional: bool = False  # slow: run where it is asked for by name


def check(
    id: str, *, title: str, step: str, causes: Iterable[str], needs: Iterable[str] = (), optional: bool = False
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register the decorated function as a check; the arguments are the fields of :class:`Check`."""

    def register(function: Callable[[Trial], None]) -> Callable[[Trial], None]:
        assert id not in _CHECKS, id
        _CHECKS[id] = Check(id, title, step, tuple(needs), tuple(causes), function, optional)
        return function

    return register


def list_checks() -> list[Check]:
    """Every check, in the order of the roadmap's steps, then by id."""
    package = importlib.import_module("diymodel.verify.checks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return sorted(_CHECKS.values(), key=lambda check: (check.step, check.id))


def select_checks(only: Iterable[str] = (), skip: Iterable[str] = (), step: str | None = None) -> list[Check]:
    """The checks whose id matches one of the globs ``only`` (none: all) and none of ``skip``, of one step or sub-step.

    Raises:
        ValueError: a glob or step matches no check, and the message names the nearest; or no check is left.
    """
    checks, only, skip = list_checks(), tuple(only), tuple(skip)
    for pattern in (*only, *skip):
        if not any(fnmatch.fnmatchcase(check.id, pattern) for check in checks):
            raise ValueError(f"no check matches {pattern!r}{nearest(pattern, checks)}")
    chosen = [
        check
        for check in checks
        if (not only or any(fnmatch.fnmatchcase(check.id, pattern) for pattern in only))
        and not any(fnmatch.fnmatchcase(check.id, pattern) for pattern in skip)
        and (step is None or check.step == step or check.step.startswith(f"{step}."))
    ]
    if step is not None and not any(check.step == step or check.step.startswith(f"{step}.") for check in checks):
        raise ValueError(f"no check belongs to step {step!r}: steps are 1 to 5, or {', '.join(_steps(checks))}")
    if not chosen:
        raise ValueError(f"nothing is left to run: only={only}, skip={skip} and step={step!r} have no check in common")
    return chosen


def nearest(id: str, checks: Iterable[Check]) -> str:
    """``"; the nearest is …"``, or nothing where no id is near."""
    close = difflib.get_close_matches(id, [check.id for check in checks], n=1, cutoff=0.3)
    return f"; the nearest is {close[0]!r}" if close else ""


def _steps(checks: Iterable[Check]) -> list[str]:
    return sorted({check.step for check in checks})
