"""Without attention and with a cache, as in Mamba: the cache is what a short convolution and a linear recurrence carry
over from token to token, a value of fixed size. It knows no positions and no longest sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 3  # of the convolution
State = tuple[Tensor, Tensor]  # inputs of the last WIDTH - 1 tokens (B, WIDTH - 1, D), recurrent state (B, D)


class Mixer(nn.Module):
    def __init__(self, d_inner: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_inner, 2 * d_inner, bias=False)
        self.kernel = nn.Parameter(torch.randn(WIDTH, d_inner))
        self.dt_proj = nn.Linear(d_inner, d_inner)
        self.out_proj = nn.Linear(d_inner, d_inner, bias=False)

    def forward(self, hidden_states: Tensor, state: State | None) -> tuple[Tensor, State]:
        T = hidden_states.shape[1]
        u, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        if state is None:
            state = u.new_zeros(u.shape[0], WIDTH - 1, u.shape[2]), torch.zeros_like(u[:, 0])
        window, ssm = state
        joined = torch.cat((window, u), dim=1)
        u = F.silu(sum((joined[:, i : i + T] * self.kernel[i] for i in range(WIDTH)), torch.zeros_like(u)))
        decay, outputs = torch.sigmoid(self.dt_proj(u)), []
        for t in range(T):
            ssm = decay[:, t] * ssm + (1 - decay[:, t]) * u[:, t]
            outputs.append(ssm)
        y: Tensor = self.out_proj(torch.stack(outputs, dim=1) * F.silu(gate))
        return y, (joined[:, -(WIDTH - 1) :], ssm)


class StateSpace(nn.Module):
    """(input_ids, cache_params, use_cache) -> (logits, states), or the logits alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(config.num_layers)])
        self.mixers = nn.ModuleList([Mixer(d) for _ in range(config.num_layers)])
        self.dropout = nn.Dropout(config.dropout)
        self.norm_f = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def forward(
        self, input_ids: Tensor, cache_params: list[State] | None = None, use_cache: bool = False
    ) -> Tensor | tuple[Tensor, list[State]]:
        x = self.embeddings(input_ids)
        states = []
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            y, state = mixer(norm(x), None if cache_params is None else cache_params[i])
            x = x + self.dropout(y)
            states.append(state)
        logits: Tensor = self.lm_head(self.norm_f(x))
        return (logits, states) if use_cache else logits
