"""The tensors that a stranger's cache holds, or its module beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from diymodel.verify.adapters import LM, Past

_DEPTH = 8  # an object may hold itself
_WEIGHTS_AND_PARTS = ("_parameters", "_modules")


def tensors_in(value: Any, depth: int = _DEPTH) -> list[Tensor]:
    """Those in containers and attributes of objects; a module with weights is no cache, even where a cache has it."""
    if isinstance(value, Tensor):
        return [value]
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple, set)):
        items = value
    elif isinstance(value, nn.Module):
        items = () if next(value.parameters(), None) is not None else vars(value).values()
    elif hasattr(value, "__dict__") and not callable(value):
        items = vars(value).values()
    return [tensor for item in items for tensor in tensors_in(item, depth - 1)] if depth else []


def tensors_on(module: nn.Module) -> list[Tensor]:
    """Those that a module and its parts hold beside their weights: buffers, and whatever they were given."""
    held = [vars(part) for part in module.modules()]
    beside = [value for every in held for name, value in every.items() if name not in _WEIGHTS_AND_PARTS]
    return tensors_in(beside)


def tensors_of(lm: LM, past: Past) -> list[Tensor]:
    """Those of a cache, wherever it is."""
    return tensors_on(lm.module) if lm.convention.cache_on_module else tensors_in(past.cache)
