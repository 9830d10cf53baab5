"""Submodules and parameters as plain attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from diymodel._compat import COMPILES_PROPERTIES

ModuleType = TypeVar("ModuleType", bound=type[nn.Module])


def direct(*, modules: tuple[str, ...] = (), parameters: tuple[str, ...] = ()) -> Callable[[ModuleType], ModuleType]:
    """Class decorator: look these submodules and parameters up right where ``nn.Module`` keeps them.

    ``nn.Module`` finds them only in ``__getattr__``, which Python calls after the ordinary lookup has failed: about
    1 µs each, and 46 of them are a sixth of a tiny model's decode step. What is found is the same: replaced
    submodules, parametrized weights and ``del`` work as ever.
    """

    def decorate(cls: ModuleType) -> ModuleType:
        if not COMPILES_PROPERTIES:  # pragma: no cover - old torch
            return cls
        for name in modules:
            setattr(cls, name, property(_module(name)))
        for name in parameters:
            setattr(cls, name, property(_parameter(name)))
        return cls

    return decorate


def _module(name: str) -> Callable[[nn.Module], Any]:
    def get(owner: nn.Module) -> Any:
        try:
            return owner._modules[name]
        except KeyError:
            raise _missing(owner, name) from None

    return get


def _parameter(name: str) -> Callable[[nn.Module], Any]:
    def get(owner: nn.Module) -> Any:
        try:
            return owner._parameters[name]
        except KeyError:
            raise _missing(owner, name) from None

    return get


def _missing(owner: nn.Module, name: str) -> AttributeError:
    return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}")
