"""The bug classes: what each is, where to look, what a learner sees, and where it was seen in public code.

One file of texts an area: ``<area>.toml``, in English and Chinese.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

AREAS = ("masks", "positions", "cache", "layers", "modes", "loss", "gradients", "checkpoints", "generation")


@dataclass(frozen=True)
class BugClass:
    """One way in which causal language models go wrong without an error."""

    slug: str
    area: str  # one of AREAS
    what: str
    what_zh: str
    look_for: str  # the line or construct in one's own code, and the fix
    look_for_zh: str
    symptom: str  # what shows in training and in generation
    symptom_zh: str
    seen: tuple[str, ...]  # issues and pull requests, as "owner/name#number"
    needs: tuple[str, ...] = ()  # parts of verify/experiments/parts.py: in a module without one of them it cannot be
    left_out: str = ""  # why the zoo has no such model

    def text(self, lang: str) -> BugText:
        """What is said of it, in "en" or "zh"."""
        if lang == "zh":
            return BugText(self.what_zh, self.look_for_zh, self.symptom_zh)
        return BugText(self.what, self.look_for, self.symptom)


class BugText(NamedTuple):
    """What is said of a class of bugs, in one language."""

    what: str
    look_for: str
    symptom: str


def list_bug_classes() -> list[BugClass]:
    """All of them, by area."""
    return list(_read().values())


def bug_class(slug: str) -> BugClass:
    """The class of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    classes = _read()
    if slug not in classes:
        close = difflib.get_close_matches(slug, classes, n=1, cutoff=0.3)
        raise ValueError(f"no bug class is called {slug!r}" + (f"; the nearest is {close[0]!r}" if close else ""))
    return classes[slug]


@functools.cache
def _read() -> dict[str, BugClass]:
    """By slug. A slug in two files, or another field than the dataclass has, is an error here."""
    found: dict[str, BugClass] = {}
    for area in AREAS:
        text = resources.files(__name__).joinpath(f"{area}.toml").read_text(encoding="utf-8")
        for slug, fields in tomllib.loads(text).items():
            assert slug not in found, f"{slug} is in {found[slug].area}.toml and {area}.toml"
            found[slug] = BugClass(
                slug=slug, area=area, seen=tuple(fields.pop("seen")), needs=tuple(fields.pop("needs", ())), **fields
            )
    return found
