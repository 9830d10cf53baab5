"""As in nanoGPT: ``(idx, targets) -> (logits, loss)``, learned positions, no cache; shifted targets, -1 ignored; it
samples from a window of its last tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        scores = scores.masked_fill(self.mask[:T, :T] == 0, -torch.inf)
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
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(T, device=idx.device)))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return logits, total / (targets != -1).sum().clamp(min=1)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """Matrices decay, vectors do not."""
        decayed = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == "cuda")

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Always sampled; of a text longer than block_size, the end counts."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.block_size :])[0][:, -1] / temperature
            if top_k is not None:
                smallest = logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]
                logits = logits.masked_fill(logits < smallest, -torch.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), 1)
        return idx
