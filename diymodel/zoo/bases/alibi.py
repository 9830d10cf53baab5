"""ALiBi: scores fall with the distance, and nothing else tells positions apart; the cache is a tuple, handed on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlibiBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.heads = config.hidden_size, config.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d, config.rms_norm_eps), nn.LayerNorm(d, config.rms_norm_eps)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)
        self.dropout = config.dropout

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        S = k.shape[2]
        distance = torch.arange(S - T, S, device=x.device)[:, None] - torch.arange(S, device=x.device)
        slope = 2.0 ** (-8 * torch.arange(1, self.heads + 1, device=x.device) / self.heads)
        bias = -slope.view(1, -1, 1, 1) * distance
        bias = bias.masked_fill(distance < 0, -torch.inf).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, d))
        h = F.dropout(F.gelu(self.up(self.ln_2(x))), self.dropout, self.training)
        return x + self.down(h), (k, v)


class Alibi(nn.Module):
    """(tokens, layer_past, use_cache) -> logits or (logits, presents); there is no longest sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.wte, self.ln_emb = nn.Embedding(config.vocab_size, d), nn.LayerNorm(d)
        self.h = nn.ModuleList(AlibiBlock(config) for _ in range(config.num_layers))
        self.ln_f, self.lm_head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, layer_past: Any = None, use_cache: bool = False) -> Any:
        x = self.ln_emb(self.wte(tokens))
        presents = []
        for i, block in enumerate(self.h):
            x, present = block(x, layer_past[i] if layer_past else None)
            presents.append(present)
        logits = self.lm_head(self.ln_f(x))
        return (logits, tuple(presents)) if use_cache else logits
