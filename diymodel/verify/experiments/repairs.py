"""Repairs: one operation of a stranger's forward pass, done as the fix of a bug would do it.

A failing trial that passes under a repair tells where the bug is, without a look at the code: where the positions of a
cached step, moved by the cached length, give the right logits, positions restart.

Shapes: B batch, T query length, S key length (cached + T), H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SDPA = torch._C._nn.scaled_dot_product_attention  # F has it too, unless a module has put its own there
SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_TABLE_DIMENSIONS = 3  # of cosines, (S, 1, D) at most; a cache (B, S, H, D) has more
_KEYS = 4  # dimensions of keys (B, H, S, D); a tensor of more holds those of several layers
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_DROPOUT = (F.dropout, torch.dropout)
_DIVISIONS = {"__truediv__", "__itruediv__", "div", "div_", "divide", "true_divide"}
_NEARLY = 1e-3  # some add a tiny number to the sum


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
    """Positions 0 … T - 1, counted or cut from a table, become start … start + T - 1.

    Args:
        only: the one place of the code that is repaired, a file and a line; None: all of them.
        found: where the places are noted.
    """

    def __init__(
        self, start: int, length: int, only: tuple[str, int] | None = None, found: set[tuple[str, int]] | None = None
    ) -> None:
        super().__init__(start, length)
        self.only = only
        self.found = set() if found is None else found

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is Tensor.__getitem__:
            return function(args[0], self._moved(args[0], args[1]))
        result = function(*args, **kwargs)
        if function is torch.arange and len(args) < 3 and "step" not in kwargs and self._counts_positions(result):
            return result + (self.start - int(result[0])) if self._is_here() else result
        return result

    def begins_wrong(self, first: int) -> bool:
        """Whether positions that begin here do so without a look at how many tokens came before."""
        return first == 0 < self.start

    def _counts_positions(self, result: Tensor) -> bool:
        if result.numel() != self.length or result.is_floating_point():
            return False
        return self.begins_wrong(int(result[0]))

    def _moved(self, table: Tensor, index: Any) -> Any:
        first = index[0] if isinstance(index, tuple) and index else index
        if not isinstance(first, slice) or first.step not in (None, 1) or not isinstance(first.stop, int):
            return index
        begin = first.start or 0
        if not isinstance(begin, int) or first.stop - begin != self.length or not self.begins_wrong(begin):
            return index
        if table.dim() > _TABLE_DIMENSIONS or table.shape[0] < self.start + self.length or not self._is_here():
            return index
        moved = slice(self.start, self.start + self.length)
        return (moved, *index[1:]) if isinstance(index, tuple) else moved

    def _is_here(self) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        here = ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
        self.found.add(here)
        return self.only in (None, here)


class PositionsOfTokensSeen(PositionsAfterTheCache):
    """Positions that begin within what is cached, after its first token, become start … start + T - 1."""

    def begins_wrong(self, first: int) -> bool:
        """Whether positions that begin here were given to tokens before."""
        return 0 < first < self.start


class CachedKeysAsHeld(Repair):
    """What is put before new keys is what the cache held, where it is that turned: other, and of the same lengths.

    Args:
        held: the tensors in the cache before the call.
    """

    def __init__(self, start: int, length: int, held: Sequence[Tensor]) -> None:
        super().__init__(start, length)
        self.held = [part for tensor in held for part in (tensor, *(tensor if tensor.dim() > _KEYS else ()))]

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _JOINS and args and isinstance(args[0], (tuple, list)):
            return function([self._as_held(part) for part in args[0]], *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _as_held(self, part: Tensor) -> Tensor:
        alike = [held for held in self.held if held.shape == part.shape and held.dtype == part.dtype]
        if part.dim() < _KEYS or any(held.equal(part) for held in alike):
            return part
        lengths = part.norm(dim=-1)
        return next((held for held in alike if torch.allclose(held.norm(dim=-1), lengths)), part)


class CausalAttention(Repair):
    """Attention masks become exactly causal: each query sees all keys up to its own, those in the cache included.

    What is added to the scores of keys that are seen stays: ALiBi is no mask.
    """

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is SDPA:
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
        if by_hand(function, args, self.length) == -1:
            powers = args[0] * self._seen(args[0], *args[0].shape[-2:])
            return powers / powers.sum(-1, keepdim=True)
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
        if by_hand(function, args, self.length) == -2:
            return args[0] / args[0].sum(-1, keepdim=True)
        return function(*args, **kwargs)


class NoDropout(Repair):
    """Dropout drops nothing."""

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function in _DROPOUT:
            return args[0] if args else kwargs["input"]
        if function is SDPA:
            return function(**{**attention_inputs(args, kwargs), "dropout_p": 0.0})
        return function(*args, **kwargs)


def over_keys(scores: Tensor, axis: Any, length: int) -> bool:
    """Whether a softmax over an axis is that of an attention in a call of T tokens, which a module may have padded."""
    if scores.dim() < 3 or axis not in (-1, scores.dim() - 1):
        return False
    queries, keys = scores.shape[-2:]
    return queries == length <= keys or queries == keys > length


def by_hand(function: Any, args: tuple[Any, ...], length: int) -> int | None:
    """Over which axis a division makes the powers of scores (…, T, S) add up to 1; None: it is no softmax by hand."""
    if getattr(function, "__name__", "") not in _DIVISIONS or not all(isinstance(x, Tensor) for x in args[:2]):
        return None
    powers, sums = args[:2]
    if not over_keys(powers, -1, length) or bool((powers < 0).any()):
        return None
    for axis in (-1, -2):
        own = powers.sum(axis, keepdim=True)
        if own.shape == sums.shape and torch.allclose(own, sums, rtol=_NEARLY):
            return axis
    return None


def attention_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch's attention, by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """That of a softmax."""
    return kwargs["dim"] if "dim" in kwargs else args[1] if len(args) > 1 else None


RepairOf = Callable[[int, int], Repair]  # of start and T
