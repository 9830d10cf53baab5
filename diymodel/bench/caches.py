"""Other ways to keep keys and values, over our own model's blocks: what our cache is compared with.

``concatenated`` is what one writes first: ``torch.cat`` of all keys and the new ones at every step, which copies the
whole cache each time. ``masked`` is what a compiler and a CUDA graph want: a buffer of full length, all of which every
step attends to, under a mask. Ours (diymodel/cache.py) writes in place, as the second, and reads what is filled, as the
first.

Shapes: B batch, T new positions, S key length, C capacity, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diymodel._compat import attention as attend
from diymodel.cache import Span
from diymodel.model import Attention, DIYForCausalLM, ModelBlock, rotate

KeepKV = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # layer, new keys, new values -> all keys, all values


def forward_on(
    model: DIYForCausalLM, ids: Tensor, cos: Tensor, sin: Tensor, keep: KeepKV, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Logits (B, 1, V) of the last of the new tokens (B, T), on a cache of any kind.

    Args:
        cos: (T, D), as ``sin``, of the new positions.
        keep: stores the new keys and values (B, K, T, D) of a layer, and returns all that is to be looked at.
        mask: (T, S), True where a query may look; None: everywhere, or where ``is_causal`` allows.
    """
    hidden = model.model.embed_tokens(ids)
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, ModelBlock)
        attention = block.self_attn
        assert isinstance(attention, Attention)
        attended = _attend(attention, layer, block.input_layernorm(hidden), cos, sin, keep, mask, is_causal)
        hidden = hidden + attended
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(model.model.norm(hidden[:, -1:]))
    return logits


def _attend(
    attention: Attention,
    layer: int,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    keep: KeepKV,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    B, T, _ = hidden.shape
    H, K, D = attention.num_heads, attention.num_kv_heads, attention.head_size
    qk, v = attention.qkv_proj(hidden).view(B, T, H + 2 * K, D).transpose(1, 2).split_with_sizes((H + K, K), 1)
    q, k = rotate(qk, cos, sin).split_with_sizes((H, K), 1)
    k, v = keep(layer, k, v)
    y = attend(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=H != K)
    attended: Tensor = attention.o_proj(y.transpose(1, 2).reshape(B, T, H * D))
    return attended


class ConcatenatedDecoder:
    """Our model with a cache that grows by ``torch.cat``."""

    is_value = True

    def __init__(self, module: DIYForCausalLM) -> None:
        self.module = module

    def whole(self, ids: Tensor) -> Tensor:
        return self.extend(ids, None)[0]

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        filled = 0 if past is None else past[0][0].shape[2]
        present: list[tuple[Tensor, Tensor]] = []

        def keep(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            if past is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(past[layer], (k, v), strict=True))
            present.append((k, v))
            return k, v

        cos, sin = _rotations(self.module, filled, ids.shape[1])
        logits = forward_on(self.module, ids, cos, sin, keep, None, is_causal=past is None and ids.shape[1] > 1)
        return logits, present


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
        self.layers = [tuple(pair.unbind()) for pair in self.buffer.unbind()]
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

        def keep(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            keys, values = self.layers[layer]
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            return keys, values

        mask = self.slots <= positions[:, None]
        cos, sin = self.cos[positions], self.sin[positions]
        return forward_on(self.module, ids, cos, sin, keep, mask, is_causal=False)


def _rotations(model: DIYForCausalLM, start: int, count: int) -> tuple[Tensor, Tensor]:
    cos, sin = model.model.rotary(Span.after(start, start, count, None), model.lm_head.weight)
    return cos, sin
