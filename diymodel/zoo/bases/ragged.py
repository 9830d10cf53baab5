"""Rows of unequal length on one cache: lengths of the new tokens, and a layer's cache with a position for each row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.scale


def rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn x (B, heads, T, D) by positions (B, T), one pair of neighbours after the other."""
    D = x.shape[-1]
    frequency = theta ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = positions[:, None, :, None].double() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class RaggedBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.hidden_size // config.num_heads
        self.groups, self.theta, self.p = config.num_heads // config.num_kv_heads, config.rope_theta, config.dropout
        self.norm_1, self.norm_2 = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.wq, self.wo = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.wk, self.wv = (nn.Linear(d, d // self.groups, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(d, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, d, bias=False)

    def forward(self, x: Tensor, positions: Tensor, slots: int, cached: dict[str, Tensor] | None) -> Any:
        """``positions`` (B, T) of the new tokens among the ``slots`` that they see."""
        B, T, d = x.shape
        h = self.norm_1(x)
        q, k, v = (w(h).view(B, T, -1, self.size).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rope(q, positions, self.theta), rope(k, positions, self.theta)
        if cached is not None:
            k, v = self.put(cached["k"], k, positions, slots), self.put(cached["v"], v, positions, slots)
        present = {"k": k, "v": v}
        mask = (torch.arange(slots, device=x.device) <= positions[:, :, None])[:, None]
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.p if self.training else 0.0)
        x = x + F.dropout(self.wo(y.transpose(1, 2).reshape(B, T, d)), self.p, self.training)
        h = self.norm_2(x)
        return x + F.dropout(self.w2(F.silu(self.w1(h)) * self.w3(h)), self.p, self.training), present

    @staticmethod
    def put(old: Tensor, new: Tensor, positions: Tensor, slots: int) -> Tensor:
        """A copy of ``old`` (B, heads, S, D) with ``slots`` places, and ``new`` at each row's own positions."""
        B, heads, T, D = new.shape
        kept = old[:, :, :slots]
        buffer = torch.cat((kept, new.new_zeros(B, heads, slots - kept.shape[2], D)), 2)
        return buffer.scatter(2, positions[:, None, :, None].expand(B, heads, T, D), new)


class Ragged(nn.Module):
    """(input_ids, seq_lengths, past_key_values, use_cache) -> logits, or (logits, [(cached, cached_pos), …])."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.limit = config.max_seq_len
        self.tok = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(RaggedBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.out.weight = self.tok.weight

    def forward(
        self,
        input_ids: Tensor,
        seq_lengths: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        B, T = input_ids.shape
        lengths = torch.full((B,), T, device=input_ids.device) if seq_lengths is None else seq_lengths
        start = past_key_values[0][1] if past_key_values is not None else torch.zeros_like(lengths)
        end = start + lengths
        if int(end.max()) > self.limit:
            raise ValueError(f"{int(end.max())} positions are more than {self.limit}")
        positions = start[:, None] + torch.arange(T, device=input_ids.device)
        real = torch.arange(T, device=input_ids.device) < lengths[:, None]
        x = self.dropout(self.tok(input_ids).masked_fill(~real[..., None], 0.0))
        presents = []
        for i, block in enumerate(self.blocks):
            x, cached = block(x, positions, int(start.max()) + T, past_key_values[i][0] if past_key_values else None)
            presents.append((cached, end))
        logits = self.out(self.norm(x))
        return (logits, presents) if use_cache else logits
