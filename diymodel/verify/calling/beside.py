"""What of a stranger's is no part of the module, and lies beside its class or beside its factory."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn


def namespaces(module: nn.Module, factory: Callable[..., Any] | None) -> Iterator[dict[str, Any]]:
    """The global names of the file that defines the module's ``forward``, and of the factory's file."""
    for found in (type(module).forward, type(module).__init__, factory, getattr(factory, "__init__", None)):
        beside = getattr(inspect.unwrap(found) if callable(found) else found, "__globals__", None)
        if beside is not None:
            yield beside


def cache_classes(module: nn.Module, factory: Callable[..., Any] | None) -> Iterator[type]:
    """Classes whose names say that they are caches: beside the module's, its parts', the factory's, and in files of
    their folders.

    Of those files, the ones that are imported; each class once.
    """
    parts = {type(part): part for part in module.modules() if not type(part).__module__.startswith("torch.")}
    near = [names for part in parts.values() for names in namespaces(part, factory)]
    folders = {_folder(names["__file__"]) for names in near if names.get("__file__")}
    files = ((found, getattr(found, "__file__", None)) for found in list(sys.modules.values()))
    near += [vars(found) for found, file in files if isinstance(file, str) and _folder(file) in folders]
    classes = {
        found: None
        for names in near
        for name, found in list(names.items())
        if "cache" in name.lower() and inspect.isclass(found)
    }
    yield from classes


@functools.cache  # of the thousands of files that torch brings, for every module that is asked about
def _folder(file: str) -> Path:
    return Path(file).parent
