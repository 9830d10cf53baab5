"""As in transformers: attention mask, mutable cache object, output object, labels shifted inside."""

from __future__ import annotations

import copy
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for kept in (self.keys, self.values):
            kept.update({layer: tensor[beam_idx] for layer, tensor in kept.items()})


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
        num_items_in_batch: int | None = None,
    ) -> Output:
        cache = past_key_values if past_key_values is not None else Cache() if use_cache else None
        start, T = cache.length() if cache is not None else 0, input_ids.shape[1]
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} positions are more than max_seq_len={self.config.max_seq_len}")
        position = torch.arange(start, start + T, device=input_ids.device)
        allowed = (torch.arange(start + T, device=input_ids.device) <= position[:, None])[None, None]
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
            if num_items_in_batch is not None:
                loss = total / num_items_in_batch
        return Output(logits, loss, cache)
