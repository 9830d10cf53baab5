"""What the caller of a module has to call for a cache: methods and classes, with the sizes that they ask for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.calling.beside import cache_classes
from diymodel.verify.convention import NewCache
from diymodel.verify.failure import refusal

_MAKER = re.compile(
    r"(set_?up|set|make|new|init|initial|initialize|create|build|empty|alloc|allocate|prepare)_"
    r"((?!rope|rotary|mask|cos|sin|freqs?)([a-z]+_)?(cache|caches|kvcache|kv)|state|states|hidden)"
)
_RESETS = (
    *("reset_kv_cache", "reset_cache", "clear_kv_cache", "clear_cache", "reset_caches", "clear_caches"),
    *("reset_state", "clear_state", "reset_states", "clear_states"),
)
_SIZES = ("max_seq_length", "max_batch_size")  # what gpt-fast remembers of its caches, and sets none up again for

# What makers of caches call the sizes they ask for; the first group of heads is tried before the second.
_ROWS = ("batch_size", "max_batch_size", "bsz", "bs", "batch", "rows", "B", "b")
_POSITIONS = ("max_seq_length", "max_seq_len", "seq_len", "max_length", "max_len", "length", "context_length", "max_t")
_LAYERS = ("num_layers", "n_layers", "n_layer", "num_hidden_layers", "layers", "depth")
_HEADS = (
    *("num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_heads", "num_kv_groups", "n_kv_groups"),
    *("num_heads", "n_heads", "n_head", "heads"),
)
_HEAD_SIZE = ("head_dim", "head_size", "dim_head", "d_head")
_ON = ("enabled", "enable", "on", "flag")
_CONFIG = ("config", "cfg", "args", "params")


def makers_on(module: nn.Module) -> list[str]:
    """The methods that make or set up a cache, by their names."""
    names = dict.fromkeys(name for kind in type(module).__mro__ for name in vars(kind))
    return [name for name in names if _MAKER.fullmatch(name) and callable(getattr(module, name, None))]


def reset_on(module: nn.Module) -> str | None:
    """The method that empties the cache which the module keeps."""
    return next((name for name in _RESETS if hasattr(module, name)), None)


def set_up(maker: str, reset: str | None) -> NewCache:
    """Clears the cache on the module and sets it up for so many rows, in the module's dtype where it takes one."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        if reset is not None:
            refusal(getattr(module, reset))  # torchtune refuses before the first set-up, when nothing is there to reset
        else:
            for name in _SIZES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, -1)
        _call(getattr(module, maker), module, config, rows, config.kv_heads)

    return new_cache


def installing(installer: str, reset: str | None) -> NewCache:
    """Has a method set up the cache on the module, after what is there was reset."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        if reset is not None:
            refusal(getattr(module, reset))
        _call(getattr(module, installer), module, config, rows, config.kv_heads)

    return new_cache


def by_method(name: str) -> NewCache:
    """What a method of the module makes."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        return _call(getattr(module, name), module, config, rows, config.kv_heads)

    return new_cache


def emptied(reset: str) -> NewCache:
    """The module's own, empty; before the first call there may be nothing to reset."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        refusal(getattr(module, reset))

    return new_cache


def after(reset: str, maker: NewCache | None) -> NewCache:
    """A new cache, after what the module keeps was reset."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        getattr(module, reset)()
        return None if maker is None else maker(module, config, rows)

    return new_cache


def by_classes(module: nn.Module, factory: Callable[..., Any] | None) -> Iterator[NewCache]:
    """Caches of the classes that lie near the module's own or its factory: one, or a list of one a layer."""
    for found in cache_classes(module, factory):
        for heads in ("kv_heads", "num_heads"):
            for a_layer in (False, True):
                yield _instances(found, heads, a_layer)


def _instances(made: type, heads: str, a_layer: bool) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        caches = [_call(made, module, config, rows, getattr(config, heads)) for _ in range(config.num_layers)]
        if isinstance(caches[0], nn.Module) and any(True for _ in caches[0].parameters()):
            raise TypeError(f"{made.__name__} has weights, and is no cache")
        return caches if a_layer else caches[0]

    return new_cache


def one_none_a_layer(module: nn.Module, config: DIYConfig, rows: int) -> list[None]:
    """An empty cache that the module fills layer by layer."""
    return [None] * config.num_layers


def two_none_a_layer(module: nn.Module, config: DIYConfig, rows: int) -> tuple[list[None], list[None]]:
    """The same of keys, and of values."""
    return [None] * config.num_layers, [None] * config.num_layers


def _call(maker: Callable[..., Any], module: nn.Module, config: DIYConfig, rows: int, heads: int) -> Any:
    """Call a maker of caches with the sizes that it asks for, by the names of its parameters."""
    parameter = next(module.parameters())
    sizes = {
        _ROWS: rows,
        _POSITIONS: config.max_seq_len,
        _LAYERS: config.num_layers,
        _HEADS: heads,
        _HEAD_SIZE: config.head_size,
        _CONFIG: getattr(module, "config", config),
        _ON: True,
        ("device",): parameter.device,
        ("dtype",): parameter.dtype,
    }
    known = {name: value for names, value in sizes.items() for name in names}
    asked = inspect.signature(maker).parameters
    return maker(**{name: value for name, value in known.items() if name in asked})
