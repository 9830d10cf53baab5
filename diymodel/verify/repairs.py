"""Repairs: one operation of a stranger's forward pass, done as the fix of a bug would do it.

A failing trial that passes under a repair tells where the bug is, without a look at the code: where the positions of a
cached step, moved by the cached length, give the right logits, positions restart.

Shapes: B batch, T query length, S key length (cached + T), H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_TABLE_DIMENSIONS = 3  # of cosines, (S, 1, D) at most; a cache (B, S, H, D) has more
_DROPOUT = (F.dropout, torch.dropout)


class Repair(TorchFunctionMode):
    """One call of the module, of T tokens after ``start`` cached ones, with an operation done differently."""

    def __init__(self, start: int, length: int) -> None:
        super().__init__()
        self.start = start
        self.length = length

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(function, args, kwargs or {})

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation, repaired where this is the one."""
        return function(*args, **kwargs)


class PositionsAfterTheCache(Repair):
    """Positions 0 … T - 1, counted or cut from a table, become start … start + T - 1."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is Tensor.__getitem__ and self.start:
            return function(args[0], self._moved(args[0], args[1]))
        result = function(*args, **kwargs)
        if function is torch.arange and self.start and self._counts_from_zero(result):
            return result + self.start
        return result

    def _counts_from_zero(self, result: Tensor) -> bool:
        return result.numel() == self.length and not result.is_floating_point() and int(result[0]) == 0

    def _moved(self, table: Tensor, index: Any) -> Any:
        first = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(first, slice) or first.step not in (None, 1):
            return index
        if first.start not in (None, 0) or first.stop != self.length or table.shape[0] < self.start + self.length:
            return index
        if table.dim() > _TABLE_DIMENSIONS:
            return index
        moved = slice(self.start, self.start + self.length)
        return (moved, *index[1:]) if isinstance(index, tuple) else moved


class CausalAttention(Repair):
    """Attention masks become exactly causal: each query sees all keys up to its own, those in the cache included.

    What is added to the scores of keys that are seen stays: ALiBi is no mask.
    """

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is F.scaled_dot_product_attention:
            inputs = attention_inputs(args, kwargs)
            seen = self._seen(inputs["query"], inputs["query"].shape[-2], inputs["key"].shape[-2])
            bias = inputs.get("attn_mask")
            if bias is not None and bias.is_floating_point():
                shown = bias.masked_fill(bias <= torch.finfo(bias.dtype).min / 2, 0.0)
                seen = shown.masked_fill(~seen, -torch.inf)
            return function(**{**inputs, "attn_mask": seen, "is_causal": False})
        if function is F.multi_head_attention_forward:
            length = args[0].shape[0]  # (T, B, hidden)
            return function(*args, **{**kwargs, "attn_mask": ~self._seen(args[0], length, length), "is_causal": False})
        if function in SOFTMAX and over_keys(args[0], dimension(args, kwargs), self.length):
            scores = args[0]
            hidden = ~self._seen(scores, scores.shape[-2], scores.shape[-1])
            return function(scores.masked_fill(hidden, -torch.inf), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _seen(self, like: Tensor, queries: int, keys: int) -> Tensor:
        first = min(self.start, keys - queries)  # a cache of a fixed size has room behind the last query
        positions = torch.arange(first, first + queries, device=like.device)
        return torch.arange(keys, device=like.device) <= positions[:, None]


class SoftmaxOverKeys(Repair):
    """A softmax over the queries is taken over the keys."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in SOFTMAX and args[0].dim() >= 3 and dimension(args, kwargs) in (-2, args[0].dim() - 2):
            return torch.softmax(args[0], -1)
        return function(*args, **kwargs)


class NoDropout(Repair):
    """Dropout drops nothing."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention:
            return function(**{**attention_inputs(args, kwargs), "dropout_p": 0.0})
        return function(*args, **kwargs)


def over_keys(scores: Tensor, axis: Any, length: int) -> bool:
    """Whether a softmax over an axis is that of an attention in a call of T tokens."""
    if scores.dim() < 3 or axis not in (-1, scores.dim() - 1):
        return False
    return scores.shape[-2] == length <= scores.shape[-1]


def attention_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch's attention, by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """That of a softmax."""
    return kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None


RepairOf = Callable[[int, int], Repair]  # of start and T
