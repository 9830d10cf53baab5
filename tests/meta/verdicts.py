"""What the checks say of the zoo's bugs, and the correct models beside them."""

from __future__ import annotations

import functools

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Result
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import OWN, Subject, resolve
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import Bug, list_bugs

EXAMPLES = 20  # trials in which a bug must show
CHECKS = {check.id: check for check in list_checks()}
KILLS = [(bug, id) for bug in list_bugs() for id in bug.kills]
LONG = {"causality.long_row", "decode.long_row", "gradients.long_row_finite", "loss.many_labels"}  # on no paper
RAISES_TOO = {"position-advances-per-layer"}  # of shapes that do not fit, where its example is large
CRASH = {f"chunk-mask-top-left-{base}-decode.chunks" for base in ("supplied", "resettable")}  # on what does not fit
ON_PAPER = {id: bug for bug, id in reversed(KILLS) if id not in LONG}  # of each check: a bug whose example shrinks
KILL_IDS = [f"{id}-{bug.id}" for bug, id in KILLS]


@functools.cache
def subject(name: str) -> Subject:
    """A correct model: a base of the zoo, or ours."""
    return resolve(OWN) if name == OWN else BASES[name].subject()


@functools.cache
def broken(bug: Bug) -> Subject:
    """A model with a bug, probed once for all that is asked of it."""
    return bug.subject()


def verdict(bug: Bug, check_id: str, shrink: bool = True) -> Result:
    """Of one check on one broken model."""
    return verify_one(broken(bug), CHECKS[check_id], Settings(EXAMPLES, shrink=shrink))
