"""As in nanochat: the caller makes the cache, which knows the position; with targets, only the loss comes back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


class KVCache:
    """Keys and values of every layer, filled as far as ``get_pos()``."""

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int) -> None:
        self.shape = (num_layers, batch_size, num_heads, seq_len, head_dim)
        self.reset()

    def reset(self) -> None:
        self.kv: tuple[Tensor, Tensor] | None = None
        self.previous: Tensor | None = None  # the last token's embedding
        self.pos = 0

    def get_pos(self) -> int:
        return self.pos

    def insert(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is None:  # in the dtype that comes
            self.kv = k.new_zeros(self.shape), v.new_zeros(self.shape)
        end = self.pos + k.shape[2]
        for kept, new in zip(self.kv, (k, v), strict=True):
            kept[layer, :, :, self.pos : end] = new
        if layer == self.shape[0] - 1:
            self.pos = end
        return self.kv[0][layer, :, :, :end], self.kv[1][layer, :, :, :end]


class SuppliedBlock(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        d, self.index = config.hidden_size, index
        self.size, self.groups = d // config.num_heads, config.num_heads // config.num_kv_heads
        self.c_q, self.c_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.c_k, self.c_v = (nn.Linear(d, d // self.groups, bias=False) for _ in range(2))
        self.c_fc, self.c_out = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kv_cache: KVCache | None) -> Tensor:
        B, T, d = x.shape
        h = norm(x)
        q, k, v = (part(h).view(B, T, -1, self.size).transpose(1, 2) for part in (self.c_q, self.c_k, self.c_v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if kv_cache is not None:
            k, v = kv_cache.insert(self.index, k, v)
        S = k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, d))
        return x + self.c_out(F.relu(self.c_fc(norm(x))).square())


class Supplied(nn.Module):
    """(idx, targets, kv_cache) -> soft-capped logits, or the loss alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.limit, size = config.max_seq_len, config.hidden_size // config.num_heads
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.smear = nn.Parameter(torch.full((config.hidden_size,), 0.5))  # how much of the previous token is mixed in
        self.h = nn.ModuleList(SuppliedBlock(config, i) for i in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        frequency = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(config.max_seq_len), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache: KVCache | None = None) -> Tensor:
        T, start = idx.shape[1], 0 if kv_cache is None else kv_cache.get_pos()
        assert start + T <= self.limit, f"{start + T} positions are more than {self.limit}"
        x = norm(self.wte(idx))
        cos, sin = (table[start : start + T].to(x.dtype) for table in (self.cos, self.sin))
        if kv_cache is None:
            assert T > 1, "a call without a cache is for training, on more than one token"
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            first = torch.zeros_like(x[:, :1]) if kv_cache.previous is None else kv_cache.previous
            before, kv_cache.previous = torch.cat((first, x[:, :-1]), 1), x[:, -1:]
        x = x + self.smear * before
        for block in self.h:
            x = block(x, cos, sin, kv_cache)
        logits = 15 * torch.tanh(self.lm_head(norm(x)).float() / 15)
        if targets is None:
            return logits
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return total / (targets != -1).sum().clamp(min=1)
