"""Other ways to keep keys and values, over our own model's blocks: what our cache is compared with.

``concatenated`` is what one writes first: ``torch.cat`` of all keys and the new ones at every step, which copies the
whole cache each time. ``masked`` is what a compiler and a CUDA graph want: a buffer of full length, all of which every
step attends to, under a mask. Ours (diymodel/cache.py) writes in place, as the second, and reads what is filled, as the
first.

Shapes: B batch, T new positions, C capacity, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diymodel.cache import LayerPast, PastKeyValues, Span
from diymodel.model import DIYForCausalLM


class _Concatenated:
    """A placement (:class:`diymodel.cache.Placement`) in tensors as long as what they hold."""

    def put(
        self, past: LayerPast | None, keys: Tensor, values: Tensor, max_length: int
    ) -> tuple[Tensor, Tensor, LayerPast]:
        if past is not None:
            keys, values = torch.cat((past[0]["k"], keys), 2), torch.cat((past[0]["v"], values), 2)
        return keys, values, ({"k": keys, "v": values}, keys.shape[2])


class _WholeBuffer(NamedTuple):
    """A placement in buffers of full length, all of which is looked at."""

    positions: Tensor  # (T,), the same for every row

    def put(
        self, past: LayerPast | None, keys: Tensor, values: Tensor, max_length: int
    ) -> tuple[Tensor, Tensor, LayerPast]:
        assert past is not None
        buffers, _ = past
        buffers["k"].index_copy_(2, self.positions, keys)
        buffers["v"].index_copy_(2, self.positions, values)
        return buffers["k"], buffers["v"], past


class ConcatenatedDecoder:
    """Our model with a cache that grows by ``torch.cat``."""

    is_value = True

    def __init__(self, module: DIYForCausalLM) -> None:
        self.module = module

    def whole(self, ids: Tensor) -> Tensor:
        return self.extend(ids, None)[0]

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        filled = 0 if past is None else past[0][1]
        cos, sin = _rotations(self.module, filled, ids.shape[1])
        backbone = self.module.model
        hidden, present = backbone.run_layers(backbone.embed_tokens(ids), cos, sin, None, _Concatenated(), past)
        return self.module.lm_head(hidden[:, -1:]), present


class MaskedDecoder:
    """Our model with a buffer of fixed length, looked at as a whole under a mask; static shapes in every step.

    Args:
        capacity: positions that the buffer holds, C.
        rows: that it holds, B.
        wrap: what the step of one token becomes: ``torch.compile``, say, or a CUDA graph of it.
    """

    is_value = True  # of one timeline: what stands behind a position is masked, and overwritten

    def __init__(
        self,
        module: DIYForCausalLM,
        capacity: int,
        rows: int = 1,
        wrap: Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> None:
        self.module = module
        config, like = module.config, module.lm_head.weight
        shape = (config.num_layers, 2, rows, config.kv_heads, capacity, config.head_size)
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.layers: PastKeyValues = [(dict(zip("kv", pair.unbind(), strict=True)), 0) for pair in self.buffer.unbind()]
        self.slots = torch.arange(capacity, device=like.device)
        self.cos, self.sin = (part.clone() for part in _rotations(module, 0, capacity))
        self._step = (wrap or (lambda step: step))(self.step)

    def whole(self, ids: Tensor) -> Tensor:
        return self.extend(ids, None)[0]

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """``past`` is the number of filled positions, (1,), and the buffer."""
        start = self.slots[:1] if past is None else past[0]
        T = ids.shape[1]
        logits = self._step(ids, start) if T == 1 else self.step(ids, start + self.slots[:T])
        return logits, (start + T, self.buffer)

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, 1, V) of the last of the tokens (B, T) at these positions (T,)."""
        mask = self.slots <= positions[:, None]
        cos, sin = self.cos[positions], self.sin[positions]
        backbone = self.module.model
        hidden, _ = backbone.run_layers(
            backbone.embed_tokens(ids), cos, sin, mask, _WholeBuffer(positions), self.layers
        )
        logits: Tensor = self.module.lm_head(hidden[:, -1:])
        return logits


def _rotations(model: DIYForCausalLM, start: int, count: int) -> tuple[Tensor, Tensor]:
    cos, sin = model.model.rotary(Span.after(start, start, count, None), model.lm_head.weight)
    return cos, sin
