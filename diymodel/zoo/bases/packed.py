"""Several documents in a row, told apart by ``document_ids``: none sees another, and each counts from position 0."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.heads, self.p = config.num_heads, config.dropout
        self.norm_attn, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Linear(inner, d), nn.Dropout(config.dropout))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm_attn(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=p)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.norm_mlp(x))


class Packed(nn.Module):
    """(tokens, document_ids, targets) -> (logits, loss); targets are shifted by the caller, and -100 is ignored."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.max_len = config.hidden_size, config.max_seq_len
        self.embed = nn.Embedding(config.vocab_size, d)
        self.position = nn.Parameter(torch.randn(config.max_seq_len, d))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PackedBlock(config) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        B, T = tokens.shape
        if self.max_len < T:
            raise ValueError(f"{T} tokens are more than {self.max_len}")
        ids = torch.zeros(B, T, dtype=torch.int64, device=tokens.device) if document_ids is None else document_ids
        place = torch.arange(T, device=tokens.device)
        begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
        first = torch.where(begins, place, 0).cummax(1).values  # where each token's document begins
        visible = (place <= place[:, None]) & (ids[:, None, :] == ids[:, :, None])
        x = self.dropout(self.embed(tokens) + self.position[place - first])
        for block in self.blocks:
            x = block(x, visible[:, None])
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return logits, total / (targets != -100).sum().clamp(min=1)
