"""As in LLMs-from-scratch: ``use_cache`` goes on where the module stands, until ``reset_kv_cache()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.num_heads = config.hidden_size, config.num_heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(d, d) for _ in range(3))
        self.out_proj, self.dropout = nn.Linear(d, d), nn.Dropout(config.dropout)
        self.reset_cache()

    def reset_cache(self) -> None:
        self.cache_k: Any = None
        self.cache_v: Any = None

    def forward(self, x: Tensor, use_cache: bool) -> Tensor:
        B, T, d = x.shape
        q, k, v = (
            part(x).view(B, T, self.num_heads, -1).transpose(1, 2) for part in (self.W_query, self.W_key, self.W_value)
        )
        if use_cache:
            if self.cache_k is not None:
                k, v = torch.cat((self.cache_k, k), 2), torch.cat((self.cache_v, v), 2)
            self.cache_k, self.cache_v = k, v
        S = k.shape[2]
        future = torch.arange(S, device=x.device) > torch.arange(S - T, S, device=x.device)[:, None]
        scores = (q @ k.transpose(2, 3)).masked_fill(future, -torch.inf)
        weights = self.dropout((scores / k.shape[-1] ** 0.5).softmax(-1))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, T, d))


class TransformerBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.att = Attention(config)
        inner = config.intermediate_size
        self.ff = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Linear(inner, d))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.drop_shortcut = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, use_cache: bool) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x), use_cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class Resettable(nn.Module):
    """(in_idx, use_cache) -> logits; learned positions, counted on the module."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_emb = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.drop_emb = nn.Dropout(config.dropout)
        self.trf_blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.out_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.current_pos = 0

    def forward(self, in_idx: Tensor, use_cache: bool = False) -> Tensor:
        T = in_idx.shape[1]
        start = self.current_pos if use_cache else 0
        if use_cache:
            self.current_pos += T
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(torch.arange(start, start + T, device=in_idx.device)))
        for block in self.trf_blocks:
            x = block(x, use_cache)
        return self.out_head(self.final_norm(x))

    def reset_kv_cache(self) -> None:
        block: Any
        for block in self.trf_blocks:
            block.att.reset_cache()
        self.current_pos = 0
