"""Where a stranger's generation begins: at the module's ``generate``, or at a method or function of another name.

Books and notebooks write it as a function that takes the model, and it lies in the file of the model's class or in that
of the factory, or is imported there.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diymodel.verify.calling.beside import namespaces
from diymodel.verify.calling.signature import told_parameters

_NAME = re.compile(r"(^|_)(generate|generation|sample|complete|completion|inference)(_|$)")
_MODEL = ("model", "net", "lm", "llm", "gpt", "module", "transformer", "decoder")
_TEXT = re.compile(r"\bstr\b")  # in an annotation


@dataclass(frozen=True)
class Entry:
    """What is called to generate; by default the module's method of that name."""

    name: str = "generate"
    function: Callable[..., Any] | None = None  # that takes the module; None: it is a method
    model: str = ""  # the function's parameter for the module

    def of(self, module: nn.Module) -> Callable[..., Any]:
        """What takes the other arguments, by name."""
        if self.function is None:
            method: Callable[..., Any] = getattr(module, self.name)
            return method
        return functools.partial(self.function, **{self.model: module})

    def parameters(self, module: nn.Module) -> Mapping[str, inspect.Parameter]:
        """Of :meth:`of`; none where the module has no such method."""
        if self.function is None and not callable(getattr(module, self.name, None)):
            return {}
        if self.function is None:
            return told_parameters(getattr(module, self.name))
        called = inspect.signature(self.function).parameters
        return {name: parameter for name, parameter in called.items() if name != self.model}

    def __str__(self) -> str:
        return f"{self.name}({self.model}, …)" if self.function else self.name


def others(module: nn.Module, factory: Callable[..., Any] | None) -> Iterator[Entry]:
    """What else may generate, the most telling names first: methods, then functions beside the class or the factory.

    Left out is what takes text, or hands its tokens out one by one.
    """
    methods = [
        Entry(name)
        for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]
        for name, found in vars(kind).items()
        if name != "generate" and _is_candidate(name, found)
    ]
    functions = [
        Entry(name, found, model)
        for beside in namespaces(module, factory)
        for name, found in beside.items()
        if _is_candidate(name, found) and (model := next((n for n in _MODEL if n in _parameters(found)), ""))
    ]
    unique = {entry.name: entry for entry in (*functions, *methods)}  # a method goes before a function of its name
    yield from sorted(unique.values(), key=lambda e: (e.function is not None, "generat" not in e.name, len(e.name)))


def _is_candidate(name: str, found: Any) -> bool:
    if not _NAME.search(name) or not inspect.isfunction(found) or inspect.isgeneratorfunction(inspect.unwrap(found)):
        return False
    return not any(_TEXT.search(inspect.formatannotation(p.annotation)) for p in _required(found))


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [parameter for parameter in _parameters(function).values() if parameter.default is parameter.empty]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters
