"""Rotary positions, grouped queries, and a cache that is a tuple of tuples of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class RotaryBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.hidden_size // config.num_heads
        self.heads, self.groups = config.num_heads, config.num_heads // config.num_kv_heads
        self.theta = config.rope_theta
        self.norm_1, self.norm_2 = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = (nn.Linear(d, d // self.groups, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, d = x.shape
        h = self.norm_1(x)
        q, k, v = (f(h).view(B, T, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        start = past[0].shape[2] if past is not None else 0
        position = torch.arange(start, start + T, device=x.device)
        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = torch.arange(k.shape[2], device=x.device) <= position[:, None]
        keys, values = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + self.drop(self.o(y.transpose(1, 2).reshape(B, T, d)))
        return x + self.drop(self.down(F.silu(self.up(self.norm_2(x))))), (k, v)


class Rotary(nn.Module):
    """(input_ids, past, use_cache) -> logits or (logits, past); the cache is a tuple of tuples of tensors."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.limit = config.max_seq_len
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([RotaryBlock(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, past: Any = None, use_cache: bool = False) -> Any:
        cached = past[0][0].shape[2] if past is not None else 0
        if cached + input_ids.shape[1] > self.limit:
            raise ValueError(f"more than {self.limit} positions")
        x = self.embed(input_ids)
        present = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, past[i] if past is not None else None)
            present.append(kv)
        logits = self.head(self.norm(x))
        return (logits, tuple(present)) if use_cache else logits
