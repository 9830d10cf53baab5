"""What SUBJECT names in a Python file or package, or one line that says what to write instead."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from diymodel.verify.failure import SubjectError, said

_folders: set[Path] = set()  # of the files that were imported


def import_named(spec: str) -> Any:
    """The object of ``path/to/file.py:name`` or ``package.module:name``.

    Raises:
        SubjectError: it does not exist or does not import.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        place, name = spec, ""
    if not name or not place:
        raise SubjectError(_without_name(place or name))
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except SubjectError:
        raise
    except SystemExit as error:
        raise SubjectError(
            f'{place} ends the program while it is imported: what is to run belongs under if __name__ == "__main__":'
        ) from error
    except Exception as error:  # a stranger's module may raise anything
        raise SubjectError(f"{place} does not import: {said(error)}{_as_package(place, name, error)}") from error
    if not hasattr(module, name):
        raise SubjectError(f"{place} has no {name!r}{_instead(module, name)}")
    return getattr(module, name)


def defined_at(found: Any) -> str:
    """What :func:`import_named` finds a class or function by; '' where that is nothing, as inside a function."""
    try:
        file = inspect.getsourcefile(found)
    except TypeError:  # it is neither, or built in
        return ""
    name = getattr(found, "__qualname__", "")
    if file is None or not name.isidentifier():
        return ""
    return f"{os.path.relpath(file)}:{name}"


def _without_name(place: str) -> str:
    """What to write where SUBJECT says no name, or is no path."""
    if place.endswith(".py") and not Path(place).is_file():
        return f"there is no file {place}"
    if place.endswith(".py"):
        return f"{place} names a file: write {place}:ClassName, or {place}:function for a function config -> nn.Module"
    if "/" in place or "\\" in place:
        return f"there is no directory {place}: write path/to/file.py:ClassName, or a directory with a config.json"
    return (
        f"{place!r} names no model: write path/to/file.py:ClassName, package.module:ClassName, hf:MODEL_TYPE or a "
        "directory with a config.json"
    )


def _instead(module: Any, name: str) -> str:
    """The models that a module has, or the name nearest to the one asked for."""
    models = [n for n, found in vars(module).items() if inspect.isclass(found) and issubclass(found, nn.Module)]
    close = difflib.get_close_matches(name, [n for n, found in vars(module).items() if callable(found)], n=1)
    return f"; it has {', '.join(models)}" if models else f"; the nearest is {close[0]!r}" if close else ""


def _import_module(name: str) -> Any:
    _put_first(Path.cwd())  # as with python -m
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise SubjectError(f"there is no file {path}")
    name = _free_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    _forget_namesakes(path.parent)
    _put_first(path.parent)  # as python does for a script: a file may import its neighbours
    spec.loader.exec_module(module)
    return module


def _free_name(path: Path) -> str:
    """That of the file, unless it is that of another module, such as ``random``, which others go on to import."""
    loaded = sys.modules.get(path.stem)
    if loaded is None or _lies_in(loaded, path.parent):
        return path.stem
    return f"{path.stem}_{hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]}"


def _forget_namesakes(folder: Path) -> None:
    """Let a file import its own neighbours, where an earlier subject's of the same name are loaded."""
    for neighbour in folder.iterdir():
        loaded = sys.modules.get(neighbour.stem)
        if loaded is not None and not _lies_in(loaded, folder) and any(_lies_in(loaded, each) for each in _folders):
            for name in [n for n in sys.modules if n == neighbour.stem or n.startswith(f"{neighbour.stem}.")]:
                del sys.modules[name]
    _folders.add(folder.resolve())


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Whether it is a file or a package of this folder."""
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    place = Path(file).resolve()
    return folder.resolve() in (place.parent, place.parent.parent if place.stem == "__init__" else None)


def _put_first(directory: Path) -> None:
    """On the path, and left there: a factory may import once it is called."""
    place = str(directory.resolve())
    if place in sys.path:
        sys.path.remove(place)
    sys.path.insert(0, place)


def _as_package(place: str, name: str, error: Exception) -> str:
    """What to write for a file that imports the package it lies in."""
    folders = list(itertools.takewhile(lambda folder: (folder / "__init__.py").exists(), Path(place).resolve().parents))
    if not folders or not isinstance(error, ImportError):
        return ""
    dotted = ".".join([*(folder.name for folder in reversed(folders)), Path(place).stem])
    return f"; the file is part of a package: write {dotted}:{name} in {folders[-1].parent}"
