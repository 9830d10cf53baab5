"""Without attention, as in small state-space models: a short causal convolution of each channel, and a linear
recurrence whose decay follows from the token. It knows no positions and no longest sequence; no cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 3


class Mixer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.conv1d = nn.Conv1d(d_model, d_model, WIDTH, groups=d_model, padding=WIDTH - 1)
        self.decay_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seqlen = x.shape[1]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.mT)[..., :seqlen].mT)
        decay = torch.sigmoid(self.decay_proj(u))
        state, states = torch.zeros_like(u[:, 0]), []
        for t in range(seqlen):
            state = decay[:, t] * state + (1 - decay[:, t]) * u[:, t]
            states.append(state)
        y: Tensor = self.out_proj(torch.stack(states, dim=1) * F.silu(z))
        return y


class ResidualBlock(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(args.hidden_size), Mixer(args.hidden_size)
        self.drop = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mixer(self.norm(x)))


class Recurrent(nn.Module):
    """(input_ids) -> logits."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleList([ResidualBlock(args) for _ in range(args.num_layers)])
        self.norm_f = nn.LayerNorm(args.hidden_size)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        if args.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm_f(x))
        return logits
