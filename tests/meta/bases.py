"""Correct models in the conventions of the wild, written without diymodel.model: no check may fail on them.

``test_every_check_can_fail.py`` breaks them by exchanging single lines of this file.
"""

from __future__ import annotations

import copy
import math
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
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = position[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class NanoBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ln_2, self.c_fc, self.mlp_proj = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.register_buffer("mask", torch.ones(config.max_seq_len, config.max_seq_len).tril())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, 2)
        q, k, v = (part.view(B, T, self.num_heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.mask[:T, :T] == 0, -math.inf)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        x = x + self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))
        return x + F.dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)))), self.dropout, self.training)


class NanoGPT(nn.Module):
    """(idx, targets) -> (logits, loss): learned positions; without targets, logits of the last position only."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.block_size = config.max_seq_len
        self.wte, self.wpe = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([NanoBlock(config) for _ in range(config.num_layers)])
        self.ln_f = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        T = idx.shape[1]
        assert self.block_size >= T, f"{T} tokens are more than block_size={self.block_size}"
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T)))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, total / (targets != -1).sum().clamp(min=1)


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
        position = torch.arange(start, start + T)
        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = torch.arange(k.shape[2]) <= position[:, None]
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


class Cache:
    """Changes under its holder's hands, as transformers' caches do."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer] = torch.cat((self.keys[layer], k), 2) if layer in self.keys else k
        self.values[layer] = torch.cat((self.values[layer], v), 2) if layer in self.values else v
        return self.keys[layer], self.values[layer]


class Output:
    def __init__(self, logits: Tensor, loss: Tensor | None, past_key_values: Cache | None) -> None:
        self.logits, self.loss, self.past_key_values = logits, loss, past_key_values


class HubBlock(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        d, self.index, self.theta = config.hidden_size, index, config.rope_theta
        self.size = d // config.num_heads
        self.norm_1, self.norm_2 = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.gate, self.up = nn.Linear(d, config.intermediate_size), nn.Linear(d, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, d)
        self.dropout = config.dropout

    def forward(self, x: Tensor, position: Tensor, allowed: Tensor, cache: Cache | None) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, -1, self.size).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        scores = q @ k.transpose(2, 3) * self.size**-0.5
        scores = scores.masked_fill(~allowed, torch.finfo(x.dtype).min)
        y = F.dropout(scores.softmax(-1), self.dropout, self.training) @ v
        x = x + self.o(y.transpose(1, 2).reshape(B, T, d))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Hub(nn.Module):
    """As in transformers: attention mask, mutable cache object, output object, labels shifted inside."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = copy.deepcopy(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HubBlock(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
    ) -> Output:
        cache = past_key_values if past_key_values is not None else Cache() if use_cache else None
        start, T = cache.length() if cache is not None else 0, input_ids.shape[1]
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} positions are more than max_seq_len={self.config.max_seq_len}")
        position = torch.arange(start, start + T)
        allowed = (torch.arange(start + T) <= position[:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position, allowed, cache)
        logits, loss = self.lm_head(self.norm(x)), None
        if labels is not None:
            scored, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            total = F.cross_entropy(scored, targets, ignore_index=-100, reduction="sum")
            loss = total / (targets != -100).sum().clamp(min=1)
        return Output(logits, loss, cache)


class Plain(nn.Module):
    """Logits only: no cache, no mask, no loss; the layers are torch's own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Parameter(torch.randn(config.max_seq_len, d))
        layer = nn.TransformerEncoderLayer(
            d, config.num_heads, config.intermediate_size, config.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))
