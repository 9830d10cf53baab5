"""Learned positions, a cache of tuples, and a ``generate``: greedy or sampled, ragged prompts, each row to its end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WriterBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.heads, self.dropout = config.num_heads, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, inner), nn.GELU(), nn.Linear(inner, d), nn.Dropout(config.dropout))

    def forward(self, x: Tensor, allowed: Tensor, past: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, d))
        return x + self.mlp(self.norm_2(x)), (k, v)


class Writer(nn.Module):
    """(input_ids, attention_mask, position_ids, past, use_cache) -> logits or (logits, past); and ``generate``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.longest = config.hidden_size, config.max_seq_len
        self.embed, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.blocks = nn.ModuleList(WriterBlock(config) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        start, T = past[0][0].shape[2] if past is not None else 0, input_ids.shape[1]
        if start + T > self.longest:
            raise ValueError(f"{start + T} tokens are more than {self.longest}")
        steps = torch.arange(start, start + T, device=input_ids.device)
        allowed = (torch.arange(start + T, device=input_ids.device) <= steps[:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, : start + T].bool()
        x = self.embed(input_ids) + self.positions(steps if position_ids is None else position_ids)
        present = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, allowed, past[i] if past is not None else None)
            present.append(kv)
        logits = self.head(self.norm(x))
        return (logits, tuple(present)) if use_cache else logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Short prompts are padded on the right; what is new stands after the padding."""
        B, T = input_ids.shape
        if T + max_new_tokens > self.longest:
            raise ValueError(f"{T} + {max_new_tokens} tokens are more than {self.longest}")
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ValueError("short prompts are padded on the right")
        last = mask.sum(1) - 1
        tokens, past, done = input_ids, None, torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        try:
            for step in range(max_new_tokens):
                position = (mask.cumsum(1) - 1).clamp(min=0)
                if past is None:
                    logits, present = self(tokens, mask, position, use_cache=True)
                else:
                    logits, present = self(tokens[:, -1:], mask, position[:, -1:], past, use_cache=True)
                past = present if use_cache else None
                logits = logits[torch.arange(B), last] if step == 0 else logits[:, -1]
                logits = penalise(logits, tokens, mask, repetition_penalty)
                new = choose(logits, temperature, top_k, top_p, generator)
                new = torch.where(done, pad_token_id, new)
                tokens = torch.cat((tokens, new[:, None]), 1)
                mask = F.pad(mask, (0, 1), value=1)
                if eos_token_id is not None:
                    done = done | (new == eos_token_id)
                    if done.all():
                        break
        finally:
            for part, training in modes:
                part.training = training
        return tokens


def penalise(logits: Tensor, tokens: Tensor, mask: Tensor, penalty: float) -> Tensor:
    held = (F.one_hot(tokens, logits.shape[-1]) * mask[..., None]).amax(1) > 0
    return torch.where(held, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]))[0]
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
