"""Without attention: every channel sums its past with a decay of its own, and what is read is mixed with the token
before it, by a shift of one. The loss takes shifted targets; no cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeMix(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.full((n_embd,), 0.5))
        self.decay = nn.Parameter(torch.linspace(-1.0, 2.0, n_embd))
        self.key, self.value = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)
        self.receptance, self.output = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        xx = torch.lerp(self.time_shift(x), x, self.mix)
        kv = torch.sigmoid(self.key(xx)) * self.value(xx)
        distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
        w = torch.sigmoid(self.decay) ** distance.clamp(min=0)[..., None]
        w = w.masked_fill((distance < 0)[..., None], 0.0)
        out: Tensor = self.output(torch.sigmoid(self.receptance(xx)) * torch.einsum("tuc,buc->btc", w, kv))
        return out


class ChannelMix(nn.Module):
    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.full((n_embd,), 0.5))
        self.key, self.value = nn.Linear(n_embd, hidden), nn.Linear(hidden, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.value(F.gelu(self.key(torch.lerp(self.time_shift(x), x, self.mix))))
        return out


class ShiftBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        n_embd = config.hidden_size
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.att, self.ffn = TimeMix(n_embd), ChannelMix(n_embd, config.intermediate_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.att(self.ln1(x)))
        return x + self.drop(self.ffn(self.ln2(x)))


class TimeShift(nn.Module):
    """(idx, targets) -> (logits, loss)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ctx_len = config.max_seq_len
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([ShiftBlock(config) for _ in range(config.num_layers)])
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if idx.shape[1] > self.ctx_len:
            raise ValueError(f"{idx.shape[1]} tokens are more than ctx_len={self.ctx_len}")
        x = self.emb(idx)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_out(x))
        if targets is None:
            return logits, None
        scored = targets.flatten()
        total = F.cross_entropy(logits.flatten(0, 1), scored, ignore_index=-100, reduction="sum")
        return logits, total / (scored != -100).sum().clamp(min=1)
