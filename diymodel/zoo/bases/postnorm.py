"""As in the first transformers: norms behind the residual sums, sinusoids for positions, scaled embeddings; rows may
hold several segments, and the loss shifts its labels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LMOutput(NamedTuple):
    loss: Tensor | None
    logits: Tensor


def sinusoids(length: int, channels: int) -> Tensor:
    rate = torch.exp(torch.arange(0, channels, 2, dtype=torch.float64) * (-math.log(10000.0) / channels))
    table = torch.zeros(length, channels, dtype=torch.float64)
    table[:, 0::2] = torch.sin(torch.arange(length)[:, None] * rate)
    table[:, 1::2] = torch.cos(torch.arange(length)[:, None] * rate)
    return table


class MultiHeadAttention(nn.Module):
    def __init__(self, n_state: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.query, self.key, self.value = (nn.Linear(n_state, n_state) for _ in range(3))
        self.out = nn.Linear(n_state, n_state)
        self.attn_dropout = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split_heads(self.query(x)), self.split_heads(self.key(x)), self.split_heads(self.value(x))
        scale = q.size(-1) ** -0.25
        weights = torch.matmul(q * scale, (k * scale).transpose(-1, -2)) + mask
        weights = self.attn_dropout(torch.softmax(weights, dim=-1))
        return self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class PostNormLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        n_state = config.hidden_size
        self.self_attn = MultiHeadAttention(n_state, config.num_heads, config.dropout)
        self.linear1 = nn.Linear(n_state, config.intermediate_size)
        self.linear2 = nn.Linear(config.intermediate_size, n_state)
        self.norm1 = nn.LayerNorm(n_state, config.rms_norm_eps)
        self.norm2 = nn.LayerNorm(n_state, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, mask)))
        hidden = nn.functional.gelu(self.linear1(x))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class PostNorm(nn.Module):
    """(input_ids, segment_ids, labels) -> LMOutput(loss, logits); no cache."""

    positions: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_ctx, n_state = config.max_seq_len, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, n_state)
        self.embed_scale = math.sqrt(n_state)
        self.register_buffer("positions", sinusoids(self.n_ctx, n_state), persistent=False)
        self.embed_norm = nn.LayerNorm(n_state)
        self.embed_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([PostNormLayer(config) for _ in range(config.num_layers)])
        self.output_projection = nn.Linear(n_state, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output_projection.weight = self.embed_tokens.weight

    def buffered_future_mask(self, input_ids: Tensor, segment_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        length = input_ids.size(1)
        hidden = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if segment_ids is not None:
            hidden = hidden | (segment_ids[:, None, :, None] != segment_ids[:, None, None, :])
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, float("-inf"))

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, labels: Tensor | None = None) -> LMOutput:
        length = input_ids.size(1)
        if length > self.n_ctx:
            raise ValueError(f"input of {length} tokens is longer than n_ctx={self.n_ctx}")
        x = self.embed_scale * self.embed_tokens(input_ids)
        x = self.embed_dropout(self.embed_norm(x + self.positions[:length].to(x.dtype)))
        mask = self.buffered_future_mask(input_ids, segment_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        logits = self.output_projection(x)
        if labels is None:
            return LMOutput(None, logits)
        log_probs = logits[:, :-1].log_softmax(dim=-1)
        target = labels[:, 1:]
        keep = target.ne(-100)
        nll = -log_probs.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = nll.masked_fill(~keep, 0.0).sum() / keep.sum().clamp(min=1)
        return LMOutput(loss, logits)
