"""A model with an unknown bug as one file, for a learner to find with the harness and name."""

from __future__ import annotations

import random

from diymodel.zoo.base import BASES
from diymodel.zoo.bug import Bug, list_bugs

_HEADER = """\
# A correct model but for one bug: quiz {number} of diymodel.
#   diymodel verify {file}:subject
#   diymodel zoo quiz {number} --answer SLUG
"""
_FOOTER = """

from diymodel.verify import Subject  # noqa: E402

subject = Subject({factory}, claims={claims!r})
"""


def bug_of(number: int) -> Bug:
    """The bug of a quiz; the same number is the same bug.

    Raises:
        ValueError: the number is negative.
    """
    if number < 0:
        raise ValueError(f"a quiz has a number from 0 on, not {number}")
    bugs = [bug for bug in list_bugs() if not bug.reference and not BASES[bug.base].declared]
    return random.Random(number).choice(bugs)


def quiz_file(number: int, file: str) -> str:
    """The text of the quiz's file, to be written as ``file``."""
    bug = bug_of(number)
    base = BASES[bug.base]
    claims = (*base.claims, *bug.claims)
    header = _HEADER.format(number=number, file=file)
    return header + bug.source.rstrip() + _FOOTER.format(factory=base.factory, claims=claims)
