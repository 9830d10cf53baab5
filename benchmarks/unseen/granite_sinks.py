"""Granite's multipliers, Gemma's sandwich of norms, the attention sinks of gpt-oss and a few experts beside a shared one.

Even layers look at the last `window` tokens, the token itself counted; odd layers at everything. A cache is made by
model.new_cache() and filled by the calls it is handed to. Several documents may stand in one row: document_ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.functional import silu


small = partial(nn.init.trunc_normal_, std=0.02)


@dataclass
class Out:
    logits: torch.Tensor
    cache: Cache | None = None
    loss: torch.Tensor | None = None


@dataclass
class Cache:
    """Keys and values of each layer, and how many tokens went through. Window layers forget what no query can see."""

    seen: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def extend(self, layer: int, k, v, window):
        if layer in self.keys:
            k = torch.cat([self.keys[layer], k], dim=2)
            v = torch.cat([self.values[layer], v], dim=2)
        kept = slice(None) if window is None else slice(max(0, k.size(2) - (window - 1)), None)
        self.keys[layer], self.values[layer] = k[:, :, kept], v[:, :, kept]
        return k, v

    def clone(self) -> Cache:
        return Cache(self.seen, dict(self.keys), dict(self.values))

    def reorder(self, rows: torch.Tensor) -> None:
        for part in (self.keys, self.values):
            for layer in part:
                part[layer] = part[layer].index_select(0, rows)


class Norm(nn.Module):
    """RMS norm whose weight is a difference from one."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt((y * y).mean(dim=-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, cfg, layer, window, cap, multiplier):
        super().__init__()
        self.layer, self.window, self.cap = layer, window if layer % 2 == 0 else None, cap
        self.heads, self.kv_heads = cfg.num_heads, cfg.num_kv_heads
        self.width = cfg.hidden_size // cfg.num_heads
        self.theta = cfg.rope_theta
        self.multiplier = multiplier / math.sqrt(self.width)
        self.wq = nn.Linear(cfg.hidden_size, self.heads * self.width, bias=False)
        self.wk = nn.Linear(cfg.hidden_size, self.kv_heads * self.width, bias=False)
        self.wv = nn.Linear(cfg.hidden_size, self.kv_heads * self.width, bias=False)
        self.wo = nn.Linear(self.heads * self.width, cfg.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.zeros(self.heads))

    def turn(self, x, positions):
        half = self.width // 2
        rate = self.theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
        angle = positions[:, None, :, None] * rate
        z = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * z
        return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)

    def forward(self, x, positions, visible, cache):
        b, t, _ = x.shape
        q = self.wq(x).view(b, t, self.heads, self.width).transpose(1, 2)
        k = self.wk(x).view(b, t, self.kv_heads, self.width).transpose(1, 2)
        v = self.wv(x).view(b, t, self.kv_heads, self.width).transpose(1, 2)
        q, k = self.turn(q, positions), self.turn(k, positions)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, self.window)
        s = k.size(2)
        k = k[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1).reshape(b, self.heads, s, self.width)
        v = v[:, :, None].expand(-1, -1, self.heads // self.kv_heads, -1, -1).reshape(b, self.heads, s, self.width)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.multiplier
        scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~visible[..., -s:], float("-inf"))
        # a sink takes weight and gives nothing
        sink = self.sinks.view(1, -1, 1, 1).expand(b, -1, t, 1).to(scores.dtype)
        weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        return self.wo(torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(b, t, -1))


class Expert(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """One expert for all tokens, and for each token the best two of the others."""

    def __init__(self, cfg, n=4, k=2):
        super().__init__()
        self.k = k
        self.router = nn.Linear(cfg.hidden_size, n, bias=False)
        self.experts = nn.ModuleList([Expert(cfg.hidden_size, cfg.intermediate_size // 2) for _ in range(n)])
        self.shared = Expert(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        score, chosen = self.router(flat).topk(self.k, dim=-1)
        share = score.softmax(dim=-1)
        routed = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            routed = routed.index_add(0, token, expert(flat[token]) * share[token, slot, None])
        return self.shared(x) + routed.view_as(x)


class Layer(nn.Module):
    def __init__(self, cfg, index, window, cap, attention_multiplier, residual_multiplier):
        super().__init__()
        self.attention = Attention(cfg, index, window, cap, attention_multiplier)
        self.experts = Experts(cfg)
        self.before_attention = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.after_attention = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.before_mlp = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.after_mlp = Norm(cfg.hidden_size, cfg.rms_norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.residual_multiplier = residual_multiplier

    def forward(self, x, positions, visible, cache):
        y = self.after_attention(self.attention(self.before_attention(x), positions, visible, cache))
        x = x + self.dropout(y) * self.residual_multiplier
        y = self.after_mlp(self.experts(self.before_mlp(x)))
        return x + self.dropout(y) * self.residual_multiplier


class GraniteLM(nn.Module):
    def __init__(self, config, window=4, cap=20.0, final_cap=15.0, embedding_multiplier=6.0, attention_multiplier=1.5,
                 residual_multiplier=0.7, logits_scaling=0.5):  # fmt: skip
        super().__init__()
        self.max_length = config.max_seq_len
        self.window, self.final_cap = window, final_cap
        self.embedding_multiplier, self.logits_scaling = embedding_multiplier, logits_scaling
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Layer(config, i, window, cap, attention_multiplier, residual_multiplier) for i in range(config.num_layers)
        )
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                small(p)
        if config.tie_word_embeddings:
            self.unembed.weight = self.embed.weight

    def new_cache(self) -> Cache:
        return Cache()

    def project(self, x):
        z = self.unembed(self.norm(x)) / self.logits_scaling
        return self.final_cap * torch.tanh(z / self.final_cap)

    def forward(self, input_ids, cache=None, document_ids=None, position_ids=None, labels=None, num_items_in_batch=None,
                **kwargs):  # fmt: skip
        """document_ids, position_ids: like input_ids; positions begin at 0 in each document unless they are given.
        labels: input_ids again, -100 where nothing is learned. Their loss is a mean, or a sum / num_items_in_batch.
        kwargs: what trainers hand over besides, not used.
        """
        b, t = input_ids.shape
        seen = 0 if cache is None else cache.seen
        if seen + t > self.max_length:
            raise ValueError(f"at most {self.max_length} tokens, not {seen + t}")
        if document_ids is not None and seen:
            raise ValueError("packed rows are for training, without a cache")
        query = torch.arange(seen, seen + t, device=input_ids.device)
        key = torch.arange(seen + t, device=input_ids.device)
        full = (key <= query[:, None])[None, None]
        if position_ids is None:
            position_ids = query.expand(b, t)
        if document_ids is not None:
            full = full & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
            begins = torch.ones_like(document_ids, dtype=torch.bool)
            begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            position_ids = query - torch.where(begins, query, 0).cummax(dim=1).values
        near = full & (query[:, None] - key < self.window)

        x = self.dropout(self.embed(input_ids) * self.embedding_multiplier)
        for layer in self.layers:
            x = layer(x, position_ids, full if layer.attention.window is None else near, cache)
        if cache is not None:
            cache.seen += t
        logits = self.project(x)
        loss = None
        if labels is not None:
            total, count = 0.0, 0
            for row, target in zip(logits[:, :-1], labels[:, 1:]):  # a row at a time, for the memory
                wanted = target != -100
                z = row[wanted].to(torch.promote_types(row.dtype, torch.float32))
                total = total + (z.logsumexp(-1) - z.gather(1, target[wanted, None])[:, 0]).sum()
                count = count + wanted.sum()
            loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return Out(logits, cache, loss)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, do_sample=False, temperature=1.0, top_k=None, eos_token_id=None,
                 pad_token_id=0, generator=None):  # fmt: skip
        """input_ids and what follows; after its eos_token_id a row is filled with pad_token_id."""
        if input_ids.size(1) + max_new_tokens > self.max_length:
            raise ValueError("too long")
        training = self.training
        self.eval()
        cache = self.new_cache()
        step, open_rows = input_ids, input_ids.new_ones(input_ids.size(0)).bool()
        for _ in range(max_new_tokens):
            z = self(step, cache=cache).logits[:, -1]
            if do_sample:
                if temperature <= 0:
                    raise ValueError("temperature must be above 0")
                z = z.double() / temperature
                if top_k is not None:
                    best = z.topk(min(top_k, z.size(-1)), dim=-1)
                    z = torch.full_like(z, float("-inf")).scatter(-1, best.indices, best.values)
                step = torch.multinomial(z.softmax(-1), 1, generator=generator)
            else:
                step = z.argmax(-1, keepdim=True)
            if eos_token_id is not None:
                step = torch.where(open_rows[:, None], step, pad_token_id)
                open_rows = open_rows & (step[:, 0] != eos_token_id)
            input_ids = torch.cat([input_ids, step], dim=1)
        self.train(training)
        return input_ids
