"""The bugs: one small change to a correct model each, by the slug of its class."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from dataclasses import dataclass

from diymodel.verify.subject import Subject
from diymodel.zoo.base import BASES


@dataclass(frozen=True)
class Bug:
    """A change to a base that some checks must not let pass."""

    slug: str  # its class, among the causes that each check in ``kills`` names
    base: str
    old: str  # occurs once, in ``where``
    new: str
    kills: tuple[str, ...]  # ids of checks that fail on it
    where: str = ""  # class or function that is changed; "": anywhere in the file
    claims: tuple[str, ...] = ()  # what the broken model promises besides

    @property
    def id(self) -> str:
        return f"{self.slug}-{self.base}-{'-'.join(self.kills)}"

    @property
    def source(self) -> str:
        """The base's file with the change."""
        source = BASES[self.base].source
        part = _part(source, self.where)
        assert part.count(self.old) == 1, f"{self.id}: {self.old!r} occurs {part.count(self.old)} times"
        return source.replace(part, part.replace(self.old, self.new))

    def subject(self) -> Subject:
        """The broken model."""
        return BASES[self.base].subject(self.source, f"zoo:{self.base}+{self.slug}", self.claims)


def list_bugs() -> list[Bug]:
    """All of them, in the order of their files."""
    package = importlib.import_module("diymodel.zoo.bugs")
    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return [bug for module in modules for bug in module.BUGS]


def _part(source: str, name: str) -> str:
    """The text of a top-level class or function; the whole for ""."""
    if not name:
        return source
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    part = ast.get_source_segment(source, nodes[name])
    assert part is not None
    return part
