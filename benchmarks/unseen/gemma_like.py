"""Something like Gemma 2/3 in one file.

Odd layers see everything, even layers a sliding window; scaled embeddings, norms before and after, norms on queries and
keys, soft caps on scores and logits, a tied head.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GemmaConfig:
    vocab_size: int = 256
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 8
    max_position_embeddings: int = 512
    sliding_window: int = 4
    rope_theta: float = 1_000_000.0
    rope_local_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attn_logit_softcapping: float = 50.0
    final_logit_softcapping: float = 30.0
    pad_token_id: int = 0


class GemmaCache:
    """Keys and values of every layer. Layers with a window keep no more than the window."""

    def __init__(self, config):
        self.windows = [config.sliding_window if is_sliding(i) else None for i in range(config.num_hidden_layers)]
        self.keys = [None] * config.num_hidden_layers
        self.values = [None] * config.num_hidden_layers
        self.seen = 0  # tokens, not entries

    def update(self, k, v, layer_idx):
        """All keys and values that the new queries may look at, oldest first."""
        if self.keys[layer_idx] is not None:
            k = torch.cat([self.keys[layer_idx], k], dim=2)
            v = torch.cat([self.values[layer_idx], v], dim=2)
        keep = self.windows[layer_idx] or k.shape[2]
        self.keys[layer_idx], self.values[layer_idx] = k[:, :, -keep:], v[:, :, -keep:]
        return k, v

    def reorder_cache(self, beam_idx):
        self.keys = [k.index_select(0, beam_idx) for k in self.keys]
        self.values = [v.index_select(0, beam_idx) for v in self.values]

    def reset(self):
        self.keys = [None] * len(self.keys)
        self.values = [None] * len(self.values)
        self.seen = 0


def is_sliding(layer_idx):
    return layer_idx % 2 == 0


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rope_tables(position_ids, dim, theta, dtype):
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, device=position_ids.device).float() / dim)
    freqs = position_ids[:, None, :, None].float() * inv_freq
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos().to(dtype), emb.sin().to(dtype)


class GemmaAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        self.head_dim = config.head_dim
        self.softcap = config.attn_logit_softcapping
        self.window = config.sliding_window if is_sliding(layer_idx) else None
        self.theta = config.rope_local_theta if is_sliding(layer_idx) else config.rope_theta
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, position_ids, padding_mask, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        cos, sin = rope_tables(position_ids, self.head_dim, self.theta, x.dtype)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin

        total = T
        if cache is not None:
            total = cache.seen + T
            k, v = cache.update(k, v, self.layer_idx)
        S = k.shape[2]
        q_idx = torch.arange(total - T, total, device=x.device)[:, None]
        k_idx = torch.arange(total - S, total, device=x.device)[None, :]
        allowed = k_idx <= q_idx
        if self.window is not None:
            allowed = allowed & (q_idx - k_idx < self.window)
        allowed = allowed[None, None]
        if padding_mask is not None:
            allowed = allowed & padding_mask[:, None, None, total - S :].bool()

        groups = self.num_heads // self.num_kv_heads
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        out = scores.softmax(dim=-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class GemmaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = GemmaAttention(config, layer_idx)
        self.mlp = GemmaMLP(config)
        self.pre_attn = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_mlp = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_mlp = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, position_ids, padding_mask, cache):
        x = x + self.post_attn(self.self_attn(self.pre_attn(x), position_ids, padding_mask, cache))
        return x + self.post_mlp(self.mlp(self.pre_mlp(x)))


class GemmaForCausalLM(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GemmaLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        self.lm_head.weight = self.embed_tokens.weight

    def make_cache(self):
        return GemmaCache(self.config)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None):
        """attention_mask: (B, tokens so far, cached ones included), 0 at padding. past_key_values is filled."""
        B, T = input_ids.shape
        seen = past_key_values.seen if past_key_values is not None else 0
        if seen + T > self.config.max_position_embeddings:
            raise ValueError(f"{seen} + {T} tokens are more than {self.config.max_position_embeddings}")
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(seen, seen + T, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]

        x = self.embed_tokens(input_ids) * math.sqrt(self.config.hidden_size)
        for layer in self.layers:
            x = layer(x, position_ids, attention_mask, past_key_values)
        if past_key_values is not None:
            past_key_values.seen += T
        logits = self.lm_head(self.norm(x))
        cap = self.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)

        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            nll = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100, reduction="sum"
            )
            loss = nll / (targets != -100).sum().clamp(min=1)
        return SimpleNamespace(logits=logits, loss=loss, past_key_values=past_key_values)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=16, do_sample=False, temperature=1.0, top_k=0,
                 eos_token_id=None, seed=None):
        mode = self.training
        self.eval()
        generator = None
        if seed is not None:
            generator = torch.Generator(device=input_ids.device)
            generator.manual_seed(seed)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        cache = self.make_cache()
        chunk = input_ids
        for _ in range(max_new_tokens):
            logits = self(chunk, attention_mask=mask, past_key_values=cache).logits[:, -1].float()
            if do_sample:
                logits = logits / temperature
                if top_k > 0:
                    limit = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1, None]
                    logits = torch.where(logits < limit, -torch.inf, logits)
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            token = token.masked_fill(done, self.config.pad_token_id)
            input_ids = torch.cat([input_ids, token[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            chunk = token[:, None]
            if eos_token_id is not None:
                done |= token == eos_token_id
                if done.all():
                    break
        self.train(mode)
        return input_ids
