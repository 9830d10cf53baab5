"""As in Meta's Llama: ``(tokens, start_pos)``, the cache in plain tensors on the module, for inference only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def turned(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Neighbouring features of x (B, T, heads, size) as complex numbers, each turned."""
    pairs = torch.view_as_complex(x.double().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).type_as(x)


class StartPosBlock(nn.Module):
    def __init__(self, config: Any, max_batch_size: int) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.hidden_size // config.num_heads
        self.repeats = config.num_heads // config.num_kv_heads
        self.wq, self.wo = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.wk, self.wv = (nn.Linear(d, d // self.repeats, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(d, config.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.intermediate_size, d, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)
        shape = (max_batch_size, config.max_seq_len, config.num_kv_heads, self.size)
        self.cache_k, self.cache_v = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        B, T, d = x.shape
        h = self.attention_norm(x)
        q, k, v = (part(h).view(B, T, -1, self.size) for part in (self.wq, self.wk, self.wv))
        q, k = turned(q, freqs_cis), turned(k, freqs_cis)
        self.cache_k, self.cache_v = self.cache_k.to(k), self.cache_v.to(v)
        self.cache_k[:B, start_pos : start_pos + T] = k
        self.cache_v[:B, start_pos : start_pos + T] = v
        keys, values = (
            cache[:B, : start_pos + T].repeat_interleave(self.repeats, 2).transpose(1, 2)
            for cache in (self.cache_k, self.cache_v)
        )
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) / self.size**0.5
        if mask is not None:
            scores = scores + mask
        y = scores.softmax(-1) @ values
        x = x + self.wo(y.transpose(1, 2).reshape(B, T, d))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class StartPos(nn.Module):
    """(tokens, start_pos) -> logits; a sequence begins anew at start_pos=0."""

    def __init__(self, config: Any, max_batch_size: int = 4) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(StartPosBlock(config, max_batch_size) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        size = config.hidden_size // config.num_heads
        frequency = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.outer(torch.arange(config.max_seq_len), frequency)
        self.freqs_cis = torch.polar(torch.ones_like(angle), angle)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        T = tokens.shape[1]
        if start_pos + T > len(self.freqs_cis):
            raise ValueError(f"{start_pos + T} positions are more than max_seq_len={len(self.freqs_cis)}")
        self.freqs_cis = self.freqs_cis.to(tokens.device)
        mask = None
        if T > 1:  # the keys that came before are open to all
            mask = torch.full((T, T), -torch.inf, device=tokens.device).triu(1)
            mask = torch.cat((torch.zeros(T, start_pos, device=tokens.device), mask), 1)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, start_pos, self.freqs_cis[start_pos : start_pos + T], mask)
        return self.output(self.norm(x))
