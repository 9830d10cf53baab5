"""Sliding-window attention over a ring buffer that the caller makes; eager, or by torch's own attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 2  # a position sees itself and the one before it


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class RingCache:
    """The last WINDOW keys and values of every layer; position p is kept in slot p % WINDOW."""

    def __init__(self) -> None:
        self.seen = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kept keys and values with the new ones behind them, and their positions."""
        if layer not in self.layers:
            B, H, _, D = k.shape
            self.layers[layer] = k.new_zeros(B, H, WINDOW, D), v.new_zeros(B, H, WINDOW, D)
        end = self.seen + k.shape[2]
        kept = torch.arange(max(0, self.seen - WINDOW), self.seen, device=k.device)
        new = torch.arange(max(self.seen, end - WINDOW), end, device=k.device)
        old_k, old_v = (ring[:, :, kept % WINDOW] for ring in self.layers[layer])
        for ring, tensor in zip(self.layers[layer], (k, v), strict=True):
            ring[:, :, new % WINDOW] = tensor[:, :, -len(new) :]
        position = torch.arange(self.seen - len(kept), end, device=k.device)
        return torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), position

    def reorder_cache(self, rows: Tensor) -> None:
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}


def eager(q: Tensor, k: Tensor, v: Tensor, gap: Tensor) -> Tensor:
    seen = (gap >= 0) & (gap < WINDOW)
    scores = (q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, gap: Tensor) -> Tensor:
    seen = (gap >= 0) & (gap < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class WindowedBlock(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        d, self.index, self.theta = config.hidden_size, index, config.rope_theta
        self.size, self.groups = d // config.num_heads, config.num_heads // config.num_kv_heads
        self.norm_1, self.norm_2 = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.q, self.o = nn.Linear(d, d), nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d // self.groups)
        self.up, self.down = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)
        self.drop = nn.Dropout(config.dropout)
        self.attend = sdpa

    def forward(self, x: Tensor, position: Tensor, cache: RingCache | None) -> Tensor:
        B, T, d = x.shape
        h = self.norm_1(x)
        k, v = self.kv(h).chunk(2, -1)
        q, k, v = (part.view(B, T, -1, self.size).transpose(1, 2) for part in (self.q(h), k, v))
        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        key_position = position
        if cache is not None:
            k, v, key_position = cache.update(self.index, k, v)
        gap = position[:, None] - key_position
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        y = self.attend(q, k, v, gap)
        x = x + self.drop(self.o(y.transpose(1, 2).reshape(B, T, d)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_2(x)))))


class Windowed(nn.Module):
    """(input_ids, cache) -> logits or (logits, cache); relative positions, so there is no longest sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WindowedBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def set_attn_implementation(self, name: str) -> None:
        for part in self.modules():
            if isinstance(part, WindowedBlock):
                part.attend = {"eager": eager, "sdpa": sdpa}[name]

    def forward(self, input_ids: Tensor, cache: RingCache | None = None, offset: int = 0) -> Any:
        start = offset if cache is None else cache.seen
        position = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position, cache)
        logits = self.head(self.norm(x))
        if cache is None:
            return logits
        cache.seen += input_ids.shape[1]
        return logits, cache


def shifted(model: Windowed, input_ids: Tensor, offset: int) -> Tensor:
    return model(input_ids, offset=offset)
