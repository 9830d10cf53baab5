"""A module in a wrapper of torch, which puts a name of its own before every name in its state_dict."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn


class Compiled(nn.Module):
    """As far as names go what torch.compile gives, without its compiler, which takes seconds to import."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self._orig_mod(*arguments, **named)


def compiled(module: nn.Module) -> Any:
    """What torch.compile gives; nothing is compiled before the first call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, as it imports its compiler
        return torch.compile(module)


class Parallel(nn.DataParallel):  # type: ignore[type-arg]  # no generic class in the oldest torch
    """A DataParallel that stays where the module is, while torch's own takes every GPU that there is."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)
