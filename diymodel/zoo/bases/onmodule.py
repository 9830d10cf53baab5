"""As in litgpt: the cache is set up on the module and addressed by ``input_pos``; the vocabulary is padded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rope_table(config: Any) -> tuple[Tensor, Tensor]:
    size = config.hidden_size // config.num_heads
    frequency = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float64), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), -1) * sin.to(x.dtype)


class KVCache(nn.Module):
    k: Tensor
    v: Tensor

    def __init__(self, shape: tuple[int, ...], device: Any, dtype: Any) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k.index_copy_(2, input_pos, k), self.v.index_copy_(2, input_pos, v)


class OnModuleBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.heads, self.groups = config.hidden_size, config.num_heads, config.num_kv_heads
        self.size = d // self.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d, config.rms_norm_eps), nn.LayerNorm(d, config.rms_norm_eps)
        self.qkv, self.proj = nn.Linear(d, (self.heads + 2 * self.groups) * self.size), nn.Linear(d, d)
        self.fc, self.out = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)
        self.dropout = config.dropout
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        B, T, d = x.shape
        heads = self.qkv(self.norm_1(x)).view(B, T, -1, self.size).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.groups, self.groups), 1)
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if input_pos is not None:
            if self.kv_cache is None:
                raise TypeError("call set_kv_cache() first")
            k, v = self.kv_cache(input_pos, k, v)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, d)), self.dropout, self.training)
        return x + F.dropout(self.out(F.gelu(self.fc(self.norm_2(x)))), self.dropout, self.training)


class OnModule(nn.Module):
    """(idx, input_pos) -> logits over a padded vocabulary; set_kv_cache() and clear_kv_cache() keep the cache here."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        padded = -(-config.vocab_size // 8) * 8
        self.config, self.max_seq_length = config, config.max_seq_len
        self.wte, self.lm_head = nn.Embedding(padded, config.hidden_size), nn.Linear(config.hidden_size, padded)
        self.h = nn.ModuleList(OnModuleBlock(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def set_kv_cache(
        self, batch_size: int, max_seq_length: int | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        block: Any
        for block in self.h:
            shape = (batch_size, block.groups, max_seq_length or self.max_seq_length, block.size)
            block.kv_cache = KVCache(shape, device, dtype)

    def clear_kv_cache(self) -> None:
        block: Any
        for block in self.h:
            block.kv_cache = None

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        T = idx.shape[1]
        if self.max_seq_length < T:
            raise ValueError(f"{T} tokens are more than max_seq_length={self.max_seq_length}")
        if input_pos is None:
            cos, sin, mask = self.cos[:T], self.sin[:T], None
        else:
            cos, sin = self.cos[input_pos], self.sin[input_pos]
            mask = torch.arange(self.max_seq_length, device=idx.device) <= input_pos[:, None]
        x = self.wte(idx)
        for block in self.h:
            x = block(x, cos, sin, mask, input_pos)
        return self.lm_head(self.ln_f(x))
