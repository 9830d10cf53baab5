"""The bugs: one small change to a correct model each, by the slug of its class."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.given import Reference
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
    reference: bool = False  # judged against its unbroken base, which is given the same weights

    @property
    def id(self) -> str:
        return f"{self.slug}-{self.base}-{'-'.join(self.kills)}"

    @property
    def source(self) -> str:
        """The base's file with the change."""
        return self.put_into(BASES[self.base].source)

    def put_into(self, source: str) -> str:
        """A text of the base's file, which may hold another bug, with the change.

        Raises:
            ValueError: what is to be changed does not stand there once.
        """
        part = _part(source, self.where)
        if part.count(self.old) != 1:
            raise ValueError(f"{self.id}: {self.old!r} occurs {part.count(self.old)} times")
        return source.replace(part, part.replace(self.old, self.new))

    def subject(self) -> Subject:
        """The broken model."""
        subject = BASES[self.base].subject(self.source, f"zoo:{self.base}+{self.slug}", self.claims)
        if self.reference:
            subject.reference = _reference(self.base)
        return subject


def list_bugs() -> list[Bug]:
    """All of them, in the order of their files."""
    package = importlib.import_module("diymodel.zoo.bugs")
    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return [bug for module in modules for bug in module.BUGS]


@functools.cache
def _reference(base: str) -> Reference:
    """The logits of an unbroken base."""
    correct = BASES[base].subject()

    def logits(config: DIYConfig, state_dict: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
        module = correct.build(config).to(correct.convention.dtype).eval()
        module.load_state_dict(state_dict)
        return LM(module, config, correct.convention).logits(input_ids)

    return logits


def _part(source: str, name: str) -> str:
    """The text of a top-level class or function; the whole for ""."""
    if not name:
        return source
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    part = ast.get_source_segment(source, nodes[name])
    assert part is not None
    return part
