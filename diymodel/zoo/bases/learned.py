"""As in GPT-2: learned positions counted over the real tokens, padding on either side, a cache of dicts, own loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.hidden_size // config.num_heads
        self.groups = config.num_heads // config.num_kv_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d, config.rms_norm_eps), nn.LayerNorm(d, config.rms_norm_eps)
        self.q_proj, self.kv_proj = nn.Linear(d, d), nn.Linear(d, 2 * d // self.groups)
        self.c_proj = nn.Linear(d, d)
        self.c_fc, self.mlp_proj = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)

    def forward(self, x: Tensor, allowed: Tensor, past: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        B, T, d = x.shape
        h = self.ln_1(x)
        q = self.q_proj(h).view(B, T, -1, self.size).transpose(1, 2)
        k, v = self.kv_proj(h).view(B, T, 2, -1, self.size).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past["k"], k), 2), torch.cat((past["v"], v), 2)
        present = {"k": k, "v": v}
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = (q @ k.transpose(2, 3)) / self.size**0.5
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        y = self.attn_dropout(scores.softmax(-1)) @ v
        x = x + self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, d)))
        return x + self.resid_dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))), present


class Learned(nn.Module):
    """(input_ids, attention_mask, position_ids, past_key_values, use_cache, labels) -> dict: logits, loss, cache."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.n_positions = config.hidden_size, config.max_seq_len
        self.wte, self.wpe = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(LearnedBlock(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(d, config.rms_norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: list[dict[str, Tensor]] | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
    ) -> dict[str, Any]:
        B, T = input_ids.shape
        start = past_key_values[0]["k"].shape[2] if past_key_values is not None else 0
        if start + T > self.n_positions:
            raise ValueError(f"{start + T} positions are more than {self.n_positions}")
        real = torch.ones(B, start + T, device=input_ids.device) if attention_mask is None else attention_mask
        real = real.bool()
        if real.shape != (B, start + T):
            raise ValueError(f"attention_mask must be {(B, start + T)}, cached and new tokens, not {tuple(real.shape)}")
        if position_ids is None:
            position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        embedded = self.wte(input_ids).masked_fill(~real[:, start:, None], 0.0)
        x = self.drop(embedded + self.wpe(position_ids))
        slot = torch.arange(start + T, device=input_ids.device)
        allowed = (slot <= slot[start:, None]) & real[:, None, None, :]
        presents = []
        for i, block in enumerate(self.h):
            x, present = block(x, allowed, past_key_values[i] if past_key_values is not None else None)
            presents.append(present)
        output: dict[str, Any] = {"logits": self.lm_head(self.ln_f(x))}
        if use_cache:
            output["past_key_values"] = presents
        if labels is not None:
            scored, targets = output["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            live = targets != -100
            output["loss"] = F.cross_entropy(scored, targets, reduction="sum") / live.sum().clamp(min=1)
        return output
