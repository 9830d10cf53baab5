"""As in x-transformers: a boolean mask, ``seq_start_pos`` for padding on the left, a cache among the intermediates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Intermediates:
    """What a call leaves behind: of each layer the keys and values."""

    def __init__(self, cache_length: int) -> None:
        self.cache_length = cache_length
        self.cached_kv: list[tuple[Tensor, Tensor]] = []


class Block(nn.Module):
    slopes: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.heads = config.hidden_size, config.num_heads
        self.pre, self.pre_ff = nn.LayerNorm(d), nn.LayerNorm(d)
        self.to_qkv, self.to_out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        inner = config.intermediate_size
        self.ff = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Linear(inner, d))
        self.dropout = nn.Dropout(config.dropout)
        slopes = 2.0 ** (-8 * torch.arange(1, self.heads + 1, dtype=torch.float64) / self.heads)
        self.register_buffer("slopes", slopes[:, None, None], persistent=False)

    def forward(
        self, x: Tensor, allowed: Tensor, distance: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, n, d = x.shape
        q, k, v = self.to_qkv(self.pre(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        sim = q @ k.transpose(2, 3) * k.shape[-1] ** -0.5 - (self.slopes * distance).to(q)
        sim = sim.masked_fill(~allowed, torch.finfo(sim.dtype).min)
        out = self.dropout(sim.softmax(-1)) @ v
        x = x + self.dropout(self.to_out(out.transpose(1, 2).reshape(b, n, d)))
        return x + self.dropout(self.ff(self.pre_ff(x))), (k, v)


class WithIntermediates(nn.Module):
    """(x, mask, seq_start_pos, cache, return_intermediates) -> logits, or (logits, intermediates); ALiBi."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.max_seq_len = config.max_seq_len
        self.token_emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.to_logits = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        x: Tensor,
        return_intermediates: bool = False,
        mask: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        cache: Intermediates | None = None,
        cache_age: int = 1,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        past = cache.cache_length if cache is not None else 0
        if past:  # x may be the whole sequence
            x = x[:, -cache_age:]
        total = past + x.shape[1]
        assert total <= self.max_seq_len, f"{total} positions are more than {self.max_seq_len}"
        position = torch.arange(total, device=x.device)
        distance = (position[past:, None] - position).clamp(min=0)
        allowed = (position <= position[past:, None])[None, None]
        if mask is not None:
            assert mask.dtype == torch.bool, "mask must be boolean"
            allowed = allowed & F.pad(mask, (total - mask.shape[1], 0), value=True)[:, None, None]
        if seq_start_pos is not None:
            allowed = allowed & (position >= seq_start_pos[:, None])[:, None, None]
        h, new = self.token_emb(x), Intermediates(total)
        for index, layer in enumerate(self.layers):
            h, kv = layer(h, allowed, distance, cache.cached_kv[index] if cache is not None else None)
            new.cached_kv.append(kv)
        logits = self.to_logits(self.final_norm(h))
        return (logits, new) if return_intermediates else logits
