"""A cache that a method sets up on the module, where calls without it are made on the module as it was before."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_INSTALLS = re.compile(
    r"((install|enable|activate|use|attach|begin|start|set_?up|set|make|init|initialize|create|build|alloc|allocate)_)"
    r"(([a-z]+_)?(cache|caches|kvcache|kv)|state|states|hidden)"
)
_STORES = ("_buffers", "_modules")  # of an nn.Module, beside what its attributes are
_CONSTANTS = (bool, int, float, str, type(None))


class _Absent:
    """In the place of an attribute that was not there; a class is the same in every copy."""


@dataclass(frozen=True)
class Installed:
    """What a method leaves on the module and its parts, and what stood there before."""

    by: str  # the method
    before: Mapping[str, Any]  # by the name of an attribute

    @contextmanager
    def removed(self, module: nn.Module) -> Iterator[None]:
        """Inside, all is as before; afterwards, as it was."""
        taken = [(part, name, _take(part, name)) for part in list(module.modules()) for name in self.before]
        there = [(part, name, found) for part, name, found in taken if found]
        for part, name, _ in there:
            if self.before[name] is not _Absent:
                vars(part)[name] = copy.copy(self.before[name])
        try:
            yield
        finally:
            for part, name, found in there:
                _take(part, name)
                for store, value in found:
                    store[name] = value


def installers_on(module: nn.Module) -> list[str]:
    """The methods that may set up a cache on the module."""
    names = dict.fromkeys(name for kind in type(module).__mro__ for name in vars(kind))
    return [name for name in names if _INSTALLS.fullmatch(name) and callable(getattr(module, name, None))]


def state_of(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What each part holds, but for its weights."""
    return [(part, _held(part)) for part in module.modules()]


def installed_by(method: str, before: list[tuple[nn.Module, dict[str, Any]]]) -> Installed | None:
    """What a method has changed since; None: nothing, or what cannot be put back, such as another tensor."""
    changed: dict[str, Any] = {}
    for part, held in before:
        for name, value in _held(part).items():
            old = held.get(name, _Absent)
            if value is old:
                continue
            empty = isinstance(old, (list, tuple, dict)) and not old
            if not (empty or old is _Absent or isinstance(old, _CONSTANTS)) or changed.setdefault(name, old) != old:
                return None
    return Installed(method, changed) if changed else None


def _held(part: nn.Module) -> dict[str, Any]:
    attributes = {name: value for name, value in vars(part).items() if name not in (*_STORES, "_parameters")}
    return {**attributes, **part._buffers, **part._modules}


def _take(part: nn.Module, name: str) -> list[tuple[dict[str, Any], Any]]:
    """Take an attribute away; where it stood."""
    stores = [vars(part), *(vars(part)[store] for store in _STORES)]
    return [(store, store.pop(name)) for store in stores if name in store]
