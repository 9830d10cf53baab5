"""A mixture of experts as in the Switch transformer: each token goes to one expert, weighed by its probability among
all; called as transformers' models are, on a legacy cache of tuples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KV = tuple[Tensor, Tensor]


@dataclass
class CausalLMOutputWithPast:
    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: tuple[KV, ...] | None = None


class SwitchRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        hidden = hidden_states.to(dtype)
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon)).to(hidden_states.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class SparseMLP(nn.Module):
    def __init__(self, config: Any, num_experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, num_experts, bias=False)
        size, inner = config.hidden_size, config.intermediate_size
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, inner), nn.SiLU(), nn.Linear(inner, size)) for _ in range(num_experts)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, 1)
        router_probs = self.router(flat).softmax(dim=-1)
        weight, chosen = router_probs.max(dim=-1)
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token = (chosen == index).nonzero()[:, 0]
            output = output.index_add(0, token, weight[token, None] * expert(flat[token]))
        return output.view_as(hidden_states)


class SwitchLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.repeats, self.rope_theta = config.num_heads // config.num_kv_heads, config.rope_theta
        self.q_proj, self.o_proj = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(size, size // self.repeats, bias=False) for _ in range(2))
        self.input_layernorm = SwitchRMSNorm(size, config.rms_norm_eps)
        self.post_attention_layernorm = SwitchRMSNorm(size, config.rms_norm_eps)
        self.mlp, self.resid_dropout = SparseMLP(config), nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, positions: Tensor, mask: Tensor, past: KV | None) -> tuple[Tensor, KV]:
        bsz, q_len, size = hidden_states.shape
        x = self.input_layernorm(hidden_states)
        q, k, v = (
            proj(x).view(bsz, q_len, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        inv_freq = self.rope_theta ** (
            -torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=x.device) / self.head_dim
        )
        emb = (positions[:, None, :, None].double() * inv_freq).repeat(1, 1, 1, 2)
        cos, sin = emb.cos().to(x.dtype), emb.sin().to(x.dtype)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        key, value = (part.repeat_interleave(self.repeats, dim=1) for part in (k, v))
        attn = nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)
        attn = attn.transpose(1, 2).reshape(bsz, q_len, size)
        hidden_states = hidden_states + self.resid_dropout(self.o_proj(attn))
        routed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.resid_dropout(routed), (k, v)


class SwitchForCausalLM(nn.Module):
    """(input_ids, attention_mask, position_ids, past_key_values, labels, use_cache) -> CausalLMOutputWithPast."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SwitchLayer(config) for _ in range(config.num_layers))
        self.norm = SwitchRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        labels: Any = None,
        use_cache: bool = False,
        num_items_in_batch: Any = None,
    ) -> CausalLMOutputWithPast:
        past_len = past_key_values[0][0].shape[2] if past_key_values else 0
        total = past_len + input_ids.shape[1]
        if total > self.config.max_seq_len:
            raise ValueError(f"{total} tokens, but max_seq_len is {self.config.max_seq_len}")
        hidden_states = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(past_len, total, device=input_ids.device)[None]
        slots = torch.arange(total, device=input_ids.device)
        visible = (slots[None, :] <= slots[past_len:, None])[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None].bool()
        mask = torch.zeros(visible.shape, dtype=hidden_states.dtype, device=input_ids.device)
        mask = mask.masked_fill(~visible, torch.finfo(hidden_states.dtype).min)
        presents = []
        for i, layer in enumerate(self.layers):
            past = past_key_values[i] if past_key_values else None
            hidden_states, present = layer(hidden_states, position_ids, mask, past)
            presents.append(present)
        logits, loss = self.lm_head(self.norm(hidden_states)), None
        if labels is not None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
            upcast = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
            loss = nn.functional.cross_entropy(upcast, shifted, ignore_index=-100, reduction="sum")
            loss = loss / (shifted != -100).sum().clamp(min=1)
            if num_items_in_batch is not None:
                loss = loss * (shifted != -100).sum() / num_items_in_batch
        return CausalLMOutputWithPast(loss, logits, tuple(presents) if use_cache else None)
