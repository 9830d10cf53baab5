"""As in OPT: learned positions counted over the mask, a cache object that grows under its holder's hands, and a
``generate`` called as that of transformers, for prompts padded on the left."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GrowingCache:
    """Of each layer keys and values (rows, heads, tokens, head_dim)."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def __len__(self) -> int:
        return self.k[0].size(2) if self.k else 0

    def append(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.k):
            self.k.append(k)
            self.v.append(v)
        else:
            self.k[layer_idx] = torch.cat([self.k[layer_idx], k], dim=2)
            self.v[layer_idx] = torch.cat([self.v[layer_idx], v], dim=2)
        return self.k[layer_idx], self.v[layer_idx]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.k = [k[indices] for k in self.k]
        self.v = [v[indices] for v in self.v]


class ScribeLayer(nn.Module):
    def __init__(self, cfg: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.nh, d = layer_idx, cfg.num_heads, cfg.hidden_size
        self.self_attn_ln, self.final_ln = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(d, cfg.intermediate_size), nn.Linear(cfg.intermediate_size, d)
        self.p = cfg.dropout

    def forward(self, x: Tensor, bias: Tensor, cache: GrowingCache | None) -> Tensor:
        n, t, d = x.shape
        h = self.self_attn_ln(x)
        q, k, v = (f(h).reshape(n, t, self.nh, d // self.nh).transpose(1, 2) for f in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)
        att = (q @ k.mT) / (d // self.nh) ** 0.5 + bias
        att = F.dropout(att.softmax(-1), p=self.p, training=self.training)
        x = x + self.o((att @ v).transpose(1, 2).reshape(n, t, d))
        return x + F.dropout(self.fc2(F.relu(self.fc1(self.final_ln(x)))), p=self.p, training=self.training)


class Scribe(nn.Module):
    """(input_ids, attention_mask, position_ids, past_key_values, use_cache) -> (logits, past_key_values)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.max_positions = cfg.max_seq_len
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.embed_positions = nn.Embedding(cfg.max_seq_len, cfg.hidden_size)
        self.layers = nn.ModuleList([ScribeLayer(cfg, i) for i in range(cfg.num_layers)])
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GrowingCache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, GrowingCache | None]:
        n, t = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = GrowingCache()
        past = 0 if past_key_values is None else len(past_key_values)
        if past + t > self.max_positions:
            raise IndexError(f"position {past + t - 1} of {self.max_positions}")
        if attention_mask is None:
            attention_mask = input_ids.new_ones(n, past + t)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        seen = (
            torch.ones(t, past + t, dtype=torch.bool, device=x.device).tril(past)[None]
            & attention_mask.bool()[:, None, : past + t]
        )
        bias = x.new_zeros(n, 1, t, past + t).masked_fill(~seen[:, None], torch.finfo(x.dtype).min)
        for layer in self.layers:
            x = layer(x, bias, past_key_values)
        return self.lm_head(self.final_layer_norm(x)), past_key_values

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 20,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        use_cache: bool = True,
        seed: int | None = None,
    ) -> Tensor:
        if input_ids.size(1) + max_new_tokens > self.max_positions:
            raise ValueError(f"prompt and {max_new_tokens} new tokens do not fit in {self.max_positions} positions")
        was_training = {m: m.training for m in self.modules()}
        self.eval()
        gen = torch.Generator(input_ids.device).manual_seed(seed) if seed is not None else None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        out, cache, running = input_ids, None, input_ids.new_ones(input_ids.size(0))
        for _ in range(max_new_tokens):
            fed = out if cache is None else out[:, -1:]
            logits, cache = self(fed, mask, None, cache, use_cache)
            scores = logits[:, -1].float()
            scores = self.repel(scores, out, mask, repetition_penalty)
            if do_sample and temperature > 0:
                scores = self.warp(scores / temperature, top_k, top_p)
                nxt = torch.multinomial(scores.softmax(-1), 1, generator=gen).squeeze(1)
            else:
                nxt = scores.argmax(-1)
            nxt = nxt * running + pad_token_id * (1 - running)
            out = torch.cat([out, nxt[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_ones(mask.size(0), 1)], dim=1)
            if eos_token_id is not None:
                running = running * (nxt != eos_token_id).long()
                if running.max() == 0:
                    break
        for m, mode in was_training.items():
            m.training = mode
        return out

    @staticmethod
    def repel(scores: Tensor, out: Tensor, mask: Tensor, penalty: float) -> Tensor:
        used = torch.where(mask > 0, out, out[:, -1:])
        own = scores.gather(1, used)
        return scores.scatter(1, used, torch.where(own < 0, own * penalty, own / penalty))

    @staticmethod
    def warp(scores: Tensor, top_k: int, top_p: float) -> Tensor:
        if top_k > 0:
            kth = torch.topk(scores, min(top_k, scores.size(-1))).values[:, -1, None]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if top_p < 1.0:
            down, idx = torch.sort(scores, descending=True)
            cum = down.softmax(-1).cumsum(-1)
            drop = cum > top_p
            drop = F.pad(drop[:, :-1], (1, 0), value=False)
            scores = scores.masked_fill(drop.scatter(1, idx, drop), float("-inf"))
        return scores
