"""Logits only: no cache, no mask, no loss; the layers are torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))
