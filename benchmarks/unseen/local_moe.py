"""Sliding-window attention with ALiBi and normalised queries and keys, beside a mixture of experts in a parallel block.

A layer's cache keeps what the window can still see; the Cache object is filled by whoever is given it.
"""

import torch
from torch import nn

WINDOW = 4
N_EXPERTS = 4
TOP = 2


def f32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dropout(x, p, training):
    if not training or p == 0.0:
        return x
    keep = torch.rand_like(x) >= p
    return x * keep / (1.0 - p)


def alibi_slopes(n_heads):
    return torch.tensor([2.0 ** (-8.0 * (h + 1) / n_heads) for h in range(n_heads)])


def unit(x):
    """Length one along the last dimension."""
    y = f32(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Cache:
    def __init__(self, n_layers):
        self.keys, self.values = [None] * n_layers, [None] * n_layers
        self.seen = 0  # tokens, also those that are gone

    def update(self, layer, k, v):
        """Old and new together; only what a later token can see is kept."""
        if self.keys[layer] is not None:
            k = torch.cat((self.keys[layer], k), dim=2)
            v = torch.cat((self.values[layer], v), dim=2)
        first = max(0, k.shape[2] - (WINDOW - 1))
        self.keys[layer], self.values[layer] = k[:, :, first:], v[:, :, first:]
        return k, v

    def reorder_cache(self, rows):
        self.keys = [k if k is None else k[rows] for k in self.keys]
        self.values = [v if v is None else v[rows] for v in self.values]


class LayerNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, x):
        y = f32(x)
        y = y - y.mean(dim=-1, keepdim=True)
        y = y / torch.sqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
        return y.to(x.dtype) * self.scale + self.shift


class LocalAttention(nn.Module):
    def __init__(self, n, heads, layer):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q, self.k, self.v = nn.Linear(n, n), nn.Linear(n, n), nn.Linear(n, n)
        self.o = nn.Linear(n, n)
        self.gain = nn.Parameter(torch.full((heads, 1, 1), 4.0))
        self.register_buffer("slopes", alibi_slopes(heads)[:, None, None])

    def forward(self, x, cache, documents):
        b, t, n = x.shape
        q, k, v = (p(x).reshape(b, t, self.heads, n // self.heads).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = unit(q), unit(k)
        seen = 0
        if cache is not None:
            seen = cache.seen
            k, v = cache.update(self.layer, k, v)
        q_pos = torch.arange(seen, seen + t, device=x.device)
        k_pos = torch.arange(seen + t - k.shape[2], seen + t, device=x.device)
        q = q * (1.0 + 0.1 * torch.log1p(q_pos.to(q.dtype)))[:, None]  # sharper the more there was to read
        distance = q_pos[:, None] - k_pos[None, :]
        hidden = (distance < 0) | (distance >= WINDOW)
        if documents is not None:
            hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
        scores = f32(q @ k.transpose(-1, -2)) * self.gain - self.slopes * distance
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v.dtype)
        return self.o((weights @ v).transpose(1, 2).reshape(b, t, n))


class Experts(nn.Module):
    def __init__(self, n, inner):
        super().__init__()
        self.router = nn.Linear(n, N_EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(n, inner), nn.SiLU(), nn.Linear(inner, n)) for _ in range(N_EXPERTS)
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = f32(self.router(flat)).softmax(-1).topk(TOP, dim=-1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            row, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, row, expert(flat[row]) * weight[row, slot, None])
        return out.view_as(x)


class ParallelBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm = LayerNorm(config.hidden_size)
        self.attention = LocalAttention(config.hidden_size, config.num_heads, layer)
        self.experts = Experts(config.hidden_size, config.intermediate_size)
        self.p = config.dropout

    def forward(self, x, cache, documents):
        y = self.norm(x)
        y = self.attention(y, cache, documents) + self.experts(y)
        return x + dropout(y, self.p, self.training)


class LocalMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(ParallelBlock(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size)

    def new_cache(self):
        return Cache(len(self.blocks))

    def forward(self, input_ids, cache=None, document_ids=None, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, cache, document_ids)
        if cache is not None:
            cache.seen += input_ids.shape[1]
        logits = self.unembed(self.norm(x))
        if labels is None:
            return logits
        nll = -f32(logits[:, :-1]).log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        counts = labels[:, 1:] != -100
        return logits, (nll * counts).sum() / counts.sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, temperature=1.0, seed=0, eos_token_id=None):
        training, rng = self.training, torch.Generator(prompt.device).manual_seed(seed)
        self.train(False)
        cache, tokens, new = self.new_cache(), [prompt], prompt
        ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
        for _ in range(max_new_tokens):
            logits = self(new, cache)[:, -1]
            if temperature == 0.0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((f32(logits) / temperature).softmax(-1), 1, generator=rng)
            if eos_token_id is not None:
                new = new.masked_fill(ended, eos_token_id)
                ended |= new == eos_token_id
            tokens.append(new)
            if ended.all():
                break
        self.train(training)
        return torch.cat(tokens, dim=1)
