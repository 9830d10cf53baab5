"""A decoder with linear biases (ALiBi) in place of position embeddings. The cache is a tuple of (k, v), one a layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def get_slopes(n_heads):
    """2^(-8/n), 2^(-16/n), ...; for other than powers of two, those of the next power below and every other one above."""

    def power_of_2(n):
        start = 2 ** (-8 / n)
        return [start ** (i + 1) for i in range(n)]

    if math.log2(n_heads).is_integer():
        return power_of_2(n_heads)
    closest = 2 ** math.floor(math.log2(n_heads))
    return power_of_2(closest) + power_of_2(2 * closest)[0::2][: n_heads - closest]


class Attention(nn.Module):
    def __init__(self, dim, n_heads, dropout):
        super().__init__()
        self.h = n_heads
        self.d = dim // n_heads
        self.scale = self.d**-0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.o = nn.Linear(dim, dim)
        self.p = dropout

    def forward(self, x, bias, keep, past):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.h, self.d).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.h, self.d).permute(2, 0, 3, 1, 4)
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            v = torch.cat((past[1], v), dim=2)
        present = (k, v)
        if keep is not None:  # padding may hold anything, and 0 * nan is nan
            v = v.masked_fill(~keep[:, None, :, None], 0.0)
        att = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        att = att + bias.to(att.dtype)
        allowed = torch.ones(t, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - t)
        if keep is not None:
            allowed = allowed & keep[:, None, None, :]
        att = att.masked_fill(~allowed, torch.finfo(att.dtype).min)
        att = F.softmax(att, dim=-1)
        att = F.dropout(att, self.p, self.training)
        y = torch.einsum("bhij,bhjd->bihd", att, v)
        return self.o(y.flatten(2)), present


class Block(nn.Module):
    def __init__(self, dim, n_heads, inner, dropout):
        super().__init__()
        self.norm_a = nn.LayerNorm(dim)
        self.attn = Attention(dim, n_heads, dropout)
        self.norm_f = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, inner)
        self.proj = nn.Linear(inner, dim)
        self.p = dropout

    def forward(self, x, bias, keep, past):
        a, present = self.attn(self.norm_a(x), bias, keep, past)
        x = x + F.dropout(a, self.p, self.training)
        f = self.proj(F.gelu(self.fc(self.norm_f(x))))
        return x + F.dropout(f, self.p, self.training), present


class AlibiLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.max_len = config.max_seq_len
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_norm = nn.LayerNorm(config.hidden_size)
        inner = config.intermediate_size or 4 * config.hidden_size
        self.blocks = nn.ModuleList(
            [Block(config.hidden_size, config.num_heads, inner, config.dropout) for _ in range(config.num_layers)]
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.emb.weight
        self.register_buffer("slopes", torch.tensor(get_slopes(config.num_heads)))

    def positions(self, keep, total, device):
        if keep is None:
            return torch.arange(total, device=device)[None]
        return (keep.long().cumsum(1) - 1).clamp(min=0)

    def forward(self, x, mask=None, cache=None, labels=None):
        """-> (logits, cache), or (logits, cache, loss) with labels, which are the tokens themselves, -100 where none counts.
        mask: (batch, cached + new), 1 at tokens, 0 at padding on the left or on the right."""
        b, t = x.shape
        past = cache[0][0].size(2) if cache is not None else 0
        if past + t > self.max_len:
            raise ValueError(f"{past} + {t} tokens, at most {self.max_len}")
        keep = mask.bool() if mask is not None else None
        pos = self.positions(keep, past + t, x.device)
        distance = pos[:, past:, None] - pos[:, None, :]
        bias = -self.slopes[:, None, None] * distance[:, None]

        h = self.emb_norm(self.emb(x))
        presents = ()
        for i, block in enumerate(self.blocks):
            h, present = block(h, bias, keep, cache[i] if cache is not None else None)
            presents += (present,)
        logits = self.head(self.norm(h))
        if labels is None:
            return logits, presents
        target = labels[:, 1:]
        picked = target != -100
        logp = F.log_softmax(logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        nll = -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        loss = nll.masked_fill(~picked, 0.0).sum() / picked.sum().clamp(min=1)
        return logits, presents, loss


def filter_logits(logits, top_k, top_p):
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ranked, order = logits.sort(dim=-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        drop = before > top_p  # the first that reaches top_p stays
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return logits


@torch.no_grad()
def generate(
    model, x, max_new_tokens, mask=None, temperature=1.0, top_k=None, top_p=None, eos_id=None, pad_id=0, seed=None,
    num_samples=1, repetition_penalty=1.0,
):  # fmt: skip
    """x and max_new_tokens more, num_samples rows a row. temperature 0 takes the best; after eos_id comes pad_id."""
    training = model.training
    model.eval()
    x = x.repeat_interleave(num_samples, dim=0)
    mask = torch.ones_like(x) if mask is None else mask.repeat_interleave(num_samples, dim=0).to(x.dtype)
    rng = torch.Generator(device=x.device)
    if seed is None:
        rng.seed()
    else:
        rng.manual_seed(seed)
    last = (mask * torch.arange(1, x.size(1) + 1, device=x.device)).argmax(dim=1)  # the last real token, wherever it is
    ended = torch.zeros(x.size(0), dtype=torch.bool, device=x.device)
    cache, fresh = None, x
    for i in range(max_new_tokens):
        logits, cache = model(fresh, mask=mask, cache=cache)
        z = logits[torch.arange(x.size(0)), last] if i == 0 else logits[:, -1]
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if repetition_penalty != 1.0:
            seen = torch.zeros_like(z).scatter_add(1, x, mask.to(z.dtype)) > 0
            z = torch.where(seen, torch.where(z > 0, z / repetition_penalty, z * repetition_penalty), z)
        if temperature == 0:
            token = z.argmax(-1)
        else:
            p = filter_logits(z / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(p, 1, generator=rng)[:, 0]
        token = torch.where(ended, pad_id, token)
        if eos_id is not None:
            ended = ended | (token == eos_id)
        fresh = token[:, None]
        x = torch.cat((x, fresh), dim=1)
        mask = torch.cat((mask, torch.ones_like(fresh)), dim=1)
    model.train(training)
    return x
