"""What SUBJECT names in a Python file or package, or one line that says what to write instead."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

from torch import nn

from diymodel.verify.failure import SubjectError, said


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
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up
    _put_first(path.parent)  # as python does for a script: a file may import its neighbours
    spec.loader.exec_module(module)
    return module


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
