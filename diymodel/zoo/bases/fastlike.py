"""As in gpt-fast: every call is on caches that ``setup_caches`` makes first, and says its positions."""

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
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotations(length: int, size: int, theta: float) -> Tensor:
    """Cosines and sines (length, size / 2, 2)."""
    angle = torch.outer(torch.arange(length), theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size))
    return torch.stack((angle.cos(), angle.sin()), -1)


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Neighbouring features of x (B, T, heads, size) as pairs, each turned."""
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rotation.to(x.dtype)[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


class KVCache(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, rows: int, heads: int, length: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(rows, heads, length, size, dtype=dtype))
        self.register_buffer("v_cache", torch.zeros(rows, heads, length, size, dtype=dtype))

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
        return self.k_cache, self.v_cache


class FastBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.heads, self.local = config.hidden_size, config.num_heads, config.num_kv_heads
        self.size = d // self.heads
        self.attention_norm, self.ffn_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.wqkv = nn.Linear(d, (self.heads + 2 * self.local) * self.size, bias=False)
        self.wo = nn.Linear(d, d, bias=False)
        self.w1, self.w3 = (nn.Linear(d, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, d, bias=False)
        self.kv_cache: Any = None

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        B, T, d = x.shape
        heads = self.wqkv(self.attention_norm(x)).view(B, T, -1, self.size)
        q, k, v = heads.split((self.heads, self.local, self.local), 2)
        q, k = turned(q, rotation), turned(k, rotation)
        k, v = self.kv_cache.update(input_pos, k.transpose(1, 2), v.transpose(1, 2))
        k, v = (part.repeat_interleave(self.heads // self.local, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        x = x + self.wo(y.transpose(1, 2).reshape(B, T, d))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class FastLike(nn.Module):
    """(idx, input_pos) -> logits, after setup_caches(); for inference only."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.max_batch_size = self.max_seq_length = -1
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FastBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        if self.max_seq_length >= max_seq_length and self.max_batch_size >= max_batch_size:
            return
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        size, dtype = self.config.hidden_size // self.config.num_heads, self.output.weight.dtype
        for layer in self.layers:
            layer.kv_cache = KVCache(max_batch_size, self.config.num_kv_heads, max_seq_length, size, dtype)
        self.rotation = rotations(max_seq_length, size, self.config.rope_theta)
        self.causal_mask = torch.ones(max_seq_length, max_seq_length, dtype=torch.bool).tril()

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        mask, rotation = self.causal_mask[input_pos], self.rotation[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, rotation, mask, input_pos)
        return self.output(self.norm(x))
