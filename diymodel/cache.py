"""The KV cache: a value to those who pass it around, a buffer that grows in place underneath.

Shapes: B batch, T new positions, S filled positions, K key/value heads, D head size.

``past_key_values`` and ``presents`` are a list with one ``(cached, cached_pos)`` a layer:

* ``cached`` is a mapping ``{"k": (B, K, S, D), "v": (B, K, S, D)}``. The model returns a :class:`LayerCache`; any
  mapping with these two tensors is taken as well, so rows can be chosen, repeated or reordered by hand
  (``{name: kv[rows] for name, kv in cached.items()}``).
* ``cached_pos`` is the number of positions in use: an int, or a ``(B,)`` tensor once rows differ in length. A smaller
  int than the length continues from an earlier position.

A cache is a value: whatever is computed from it, passing it again gives the same answer. It is cheap all the same,
because slots at and beyond ``cached_pos`` are never read through it: the first to continue a cache writes its new
keys right there, in O(T). Only who continues it a second time, from a version that is no longer the newest, pays for
a copy. That holds for calls one after the other: threads that continue one cache at once each need a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diymodel.config import DIYConfig

LayerPast = tuple[Mapping[str, Tensor], int | Tensor]
PastKeyValues = list[LayerPast]

_SMALLEST_CAPACITY = 64


class _Buffer:
    """Preallocated keys and values of one layer, (B, K, capacity, D); ``version`` counts what was appended."""

    __slots__ = ("keys", "values", "version")

    def __init__(self, like: Tensor, capacity: int) -> None:
        # Zeros, not empty: a short row never reads its unused slots, but 0 * NaN would reach it through the masked sum.
        B, K, _, D = like.shape
        self.keys = like.new_zeros(B, K, capacity, D)
        self.values = like.new_zeros(B, K, capacity, D)
        self.version = 0

    def is_writable(self) -> bool:
        """Torch forbids writing, outside inference mode, to what was made inside it."""
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()


class LayerCache(Mapping[str, Tensor]):
    """The keys and values of one layer up to one moment; read-only, indexed by ``"k"`` and ``"v"``."""

    __slots__ = ("_buffer", "_version", "cached_pos", "length")

    def __init__(self, buffer: _Buffer, cached_pos: int | Tensor, length: int) -> None:
        self._buffer = buffer
        self._version = buffer.version
        self.cached_pos = cached_pos
        self.length = length

    def __getitem__(self, name: str) -> Tensor:
        if name == "k":
            return self._buffer.keys.narrow(2, 0, self.length)
        if name == "v":
            return self._buffer.values.narrow(2, 0, self.length)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("k", "v"))

    def __len__(self) -> int:
        return 2

    def __repr__(self) -> str:
        return f"LayerCache(k, v: {tuple(self['k'].shape)}, capacity={self._buffer.keys.shape[2]})"

    def tip(self, cached_pos: int | Tensor) -> _Buffer | None:
        """The buffer, if writing at ``cached_pos`` can disturb no other holder of it."""
        newest = self._version == self._buffer.version and self._buffer.is_writable()
        own = self.cached_pos
        same = cached_pos is own or (isinstance(cached_pos, int) and isinstance(own, int) and cached_pos == own)
        return self._buffer if newest and same else None


class Placement(Protocol):
    """Where a forward pass keeps its new keys and values; the same for all layers."""

    def put(
        self, past: LayerPast | None, keys: Tensor, values: Tensor, max_length: int
    ) -> tuple[Tensor, Tensor, LayerPast]:
        """Put new keys and values (B, K, T, D) behind the cached ones of a layer.

        Args:
            past: the layer's cache; None starts one.
            max_length: positions beyond which no buffer is enlarged ahead of need.

        Returns:
            All keys and all values to look at, (B, K, S, D), and the layer's new cache.
        """
        ...


class Span(NamedTuple):
    """Where the T new positions of every row go, in a cache that is a value."""

    start: int | Tensor  # first new position: one for all rows, or (B,)
    end: int | Tensor  # position after the last real one
    filled: int  # largest start
    length: int  # largest end
    num_new: int  # T

    @property
    def total(self) -> int:
        """Slots that the new tokens see, S: those filled before and T more."""
        return self.filled + self.num_new

    @classmethod
    def after(cls, start: int | Tensor, filled: int, num_new: int, seq_lengths: Tensor | None) -> Span:
        """The span that follows ``start``; ``seq_lengths`` (B,): how many of the T new tokens are real, None: all."""
        if seq_lengths is None:
            return cls(start, start + num_new, filled, filled + num_new, num_new)
        end = start + seq_lengths
        shortest, longest = (int(bound) for bound in end.aminmax())
        return cls(start, longest if shortest == longest else end, filled, longest, num_new)

    def slots(self, device: torch.device) -> Tensor:
        """Position of every new token: (T,), or (B, T) where rows differ."""
        steps = torch.arange(self.num_new, device=device)
        return steps + (self.start if isinstance(self.start, int) else self.start[:, None])

    def mask(self, device: torch.device) -> Tensor | None:
        """Causality, (T, S) or (B, 1, T, S), True where a query may look; None where ``is_causal`` can say it.

        ``is_causal`` aligns the first query with the first key, so it is right only where no key is cached (or for a
        single query that sees all). Padding needs no mask: on the right, it comes after every real query.
        """
        if self.filled == 0 or (isinstance(self.start, int) and self.num_new == 1):
            return None
        visible = torch.arange(self.total, device=device) <= self.slots(device)[..., None]
        return visible if isinstance(self.start, int) else visible[:, None]

    def put(
        self, past: LayerPast | None, keys: Tensor, values: Tensor, max_length: int
    ) -> tuple[Tensor, Tensor, LayerPast]:
        """As :meth:`Placement.put`, S = filled + T; ``past`` is left as it was for whoever holds it.

        Raises:
            ValueError: the cache holds another dtype than the new keys.
        """
        if past is not None and (cached_dtype := _dtype(past[0])) != keys.dtype:
            raise ValueError(
                f"the cache holds {cached_dtype} and the new keys are {keys.dtype}: it was filled by this model in "
                "another dtype, or under another autocast setting"
            )
        total = self.total
        buffer = past[0].tip(past[1]) if past is not None and isinstance(past[0], LayerCache) else None
        if buffer is None or buffer.keys.shape[2] < total:
            buffer = _Buffer(keys, max(total, min(max(2 * total, _SMALLEST_CAPACITY), max_length)))
            if past is not None:
                buffer.keys.narrow(2, 0, self.filled).copy_(past[0]["k"].narrow(2, 0, self.filled))
                buffer.values.narrow(2, 0, self.filled).copy_(past[0]["v"].narrow(2, 0, self.filled))
        if isinstance(self.start, int):
            buffer.keys.narrow(2, self.start, self.num_new).copy_(keys)
            buffer.values.narrow(2, self.start, self.num_new).copy_(values)
        else:
            slots = self.slots(keys.device)[:, None, :, None].expand_as(keys)
            buffer.keys.scatter_(2, slots, keys)
            buffer.values.scatter_(2, slots, values)
        buffer.version += 1
        present = LayerCache(buffer, self.end, self.length), self.end
        return buffer.keys.narrow(2, 0, total), buffer.values.narrow(2, 0, total), present


class FixedSlots(NamedTuple):
    """Where one new token a row goes in buffers of fixed size, in place; for a compiled step, whose shapes stay."""

    positions: Tensor  # (B,)
    visible: int  # slots that are looked at, from the first on

    def put(
        self, past: LayerPast | None, keys: Tensor, values: Tensor, max_length: int
    ) -> tuple[Tensor, Tensor, LayerPast]:
        """As :meth:`Placement.put`, S = visible; ``past`` holds the buffers, (B, K, capacity, D)."""
        assert past is not None
        rows = torch.arange(len(self.positions), device=keys.device)
        buffers = (past[0]["k"], past[0]["v"])
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[rows, :, self.positions] = new.squeeze(2)
        return buffers[0].narrow(2, 0, self.visible), buffers[1].narrow(2, 0, self.visible), past


def check_cache(
    past_key_values: PastKeyValues, config: DIYConfig, batch_size: int, device: torch.device
) -> tuple[int | Tensor, int]:
    """Refuse a cache that this model cannot continue for this batch.

    Returns:
        ``cached_pos``, and the largest position it holds.

    Raises:
        TypeError: it is not a list of ``(cached, cached_pos)``.
        ValueError: it comes from another configuration, batch size or device, or its parts disagree.
    """
    if not isinstance(past_key_values, (list, tuple)):
        raise TypeError(
            f"past_key_values must be the list of (cached, cached_pos) that the model returned, got "
            f"{type(past_key_values).__name__}"
        )
    if len(past_key_values) != config.num_layers:
        raise ValueError(f"the cache has {len(past_key_values)} layers and the model has {config.num_layers}")
    expected = (batch_size, config.kv_heads, config.head_size)
    positions, lengths = [], []
    for layer, entry in enumerate(past_key_values):
        if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], (LayerCache, Mapping))):
            raise TypeError(f'past_key_values[{layer}] must be a pair ({{"k": …, "v": …}}, cached_pos), got {entry!r}')
        cached, cached_pos = entry
        keys, length = (cached._buffer.keys, cached.length) if isinstance(cached, LayerCache) else _foreign(cached)
        B, K, _, D = keys.shape
        if expected != (B, K, D):
            raise ValueError(
                f"the cache of layer {layer} has (batch, kv_heads, head_size) = {B, K, D} and this call needs "
                f"{expected}: it belongs to another batch or configuration"
            )
        if keys.device != device:
            raise ValueError(f"the cache of layer {layer} is on {keys.device} and input_ids on {device}")
        positions.append(cached_pos)
        lengths.append(length)
    filled = _largest(positions[0], past_key_values[0][0], batch_size, min(lengths), device)
    for layer, cached_pos in enumerate(positions):
        if not _same(cached_pos, positions[0]):
            raise ValueError(
                f"cached_pos of layer {layer} is {cached_pos} and of layer 0 {positions[0]}; they must agree"
            )
    return positions[0], filled


def _largest(cached_pos: int | Tensor, cached: Mapping[str, Tensor], B: int, length: int, device: torch.device) -> int:
    """The largest position in use, after holding ``cached_pos`` to the ``length`` that every layer has."""
    if isinstance(cached_pos, int):
        low = high = cached_pos
    elif not isinstance(cached_pos, Tensor):
        raise TypeError(f"cached_pos must be an int or a (batch,) tensor, got {type(cached_pos).__name__}")
    elif isinstance(cached, LayerCache) and cached_pos is cached.cached_pos:
        return cached.length
    elif cached_pos.shape != (B,) or cached_pos.dtype != torch.int64 or cached_pos.device != device:
        raise ValueError(
            f"cached_pos must be an int or an int64 tensor of shape ({B},) on {device}, got {cached_pos.dtype} "
            f"{tuple(cached_pos.shape)} on {cached_pos.device}"
        )
    else:
        low, high = (int(bound) for bound in cached_pos.aminmax())
    if low < 0 or high > length:
        raise ValueError(f"cached_pos {low if low < 0 else high} is outside the {length} positions that are cached")
    return high


def _foreign(cached: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The keys of a cache that somebody put together, and how many positions it holds."""
    if set(cached) != {"k", "v"}:
        raise ValueError(f"a layer's cache has exactly the entries 'k' and 'v', got {sorted(cached)}")
    keys, values = cached["k"], cached["v"]
    for name, tensor in (("k", keys), ("v", values)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} of a layer's cache must be a tensor, got {type(tensor).__name__}")
    if (keys.dtype, keys.device) != (values.dtype, values.device):
        raise ValueError(
            f"'k' and 'v' of a layer's cache must have one dtype and device, got {keys.dtype} on {keys.device} and "
            f"{values.dtype} on {values.device}"
        )
    if keys.dim() != 4 or keys.shape != values.shape:
        raise ValueError(
            f"'k' and 'v' of a layer's cache must both be (batch, kv_heads, positions, head_size), got "
            f"{tuple(keys.shape)} and {tuple(values.shape)}"
        )
    return keys, keys.shape[2]


def _dtype(cached: Mapping[str, Tensor]) -> torch.dtype:
    return cached._buffer.keys.dtype if isinstance(cached, LayerCache) else cached["k"].dtype


def _same(a: int | Tensor, b: int | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return isinstance(a, int) and isinstance(b, int) and a == b
