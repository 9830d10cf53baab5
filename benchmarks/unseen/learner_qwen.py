# My port of Qwen3, after reading the paper and two other people's ports. Plain functions where I could.
# kv_caches is a list with one (k, v) per layer, it is never changed, a new list comes back.
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        xf = x if x.dtype == torch.float64 else x.float()
        normed = xf / torch.sqrt(xf.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.scale


def rope_angles(head_dim, positions, theta):
    """(T,) positions -> cos, sin of (T, head_dim / 2), in float64 because it is cheap"""
    power = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions.double()[:, None] / theta ** power[None, :]
    return torch.cos(angles), torch.sin(angles)


def rotate(x, cos, sin):
    """x: (B, H, T, head_dim). The two halves are paired, as in the released weights."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GroupedQueryAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_q = cfg["n_heads"]
        self.n_kv = cfg["n_kv_groups"]
        self.head_dim = cfg["emb_dim"] // cfg["n_heads"]
        self.W_query = nn.Linear(cfg["emb_dim"], self.n_q * self.head_dim, bias=False)
        self.W_key = nn.Linear(cfg["emb_dim"], self.n_kv * self.head_dim, bias=False)
        self.W_value = nn.Linear(cfg["emb_dim"], self.n_kv * self.head_dim, bias=False)
        self.out_proj = nn.Linear(self.n_q * self.head_dim, cfg["emb_dim"], bias=False)
        self.q_norm = RMSNorm(self.head_dim, cfg["eps"])
        self.k_norm = RMSNorm(self.head_dim, cfg["eps"])

    def forward(self, x, cos, sin, start_pos, cache):
        b, t, _ = x.shape
        queries = self.W_query(x).view(b, t, self.n_q, self.head_dim).transpose(1, 2)
        keys = self.W_key(x).view(b, t, self.n_kv, self.head_dim).transpose(1, 2)
        values = self.W_value(x).view(b, t, self.n_kv, self.head_dim).transpose(1, 2)
        queries = rotate(self.q_norm(queries), cos, sin)
        keys = rotate(self.k_norm(keys), cos, sin)
        if cache is not None:
            prev_k, prev_v = cache
            keys = torch.cat([prev_k, keys], dim=2)
            values = torch.cat([prev_v, values], dim=2)
        next_cache = (keys, values)

        # grouped without copying: (b, kv, group, t, d) against (b, kv, 1, s, d)
        queries = queries.reshape(b, self.n_kv, self.n_q // self.n_kv, t, self.head_dim)
        scores = queries @ keys.unsqueeze(2).transpose(-2, -1)
        row = torch.arange(start_pos, start_pos + t, device=x.device)
        col = torch.arange(keys.shape[2], device=x.device)
        scores = scores.masked_fill(col[None, :] > row[:, None], -torch.inf)
        weights = torch.softmax(scores / self.head_dim**0.5, dim=-1)
        context = (weights @ values.unsqueeze(2)).reshape(b, self.n_q, t, self.head_dim)
        context = context.transpose(1, 2).reshape(b, t, self.n_q * self.head_dim)
        return self.out_proj(context), next_cache


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False)
        self.fc2 = nn.Linear(cfg["emb_dim"], cfg["hidden_dim"], bias=False)
        self.fc3 = nn.Linear(cfg["hidden_dim"], cfg["emb_dim"], bias=False)

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = GroupedQueryAttention(cfg)
        self.ff = FeedForward(cfg)
        self.norm1 = RMSNorm(cfg["emb_dim"], cfg["eps"])
        self.norm2 = RMSNorm(cfg["emb_dim"], cfg["eps"])
        self.drop = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, cos, sin, start_pos, cache):
        att, next_cache = self.att(self.norm1(x), cos, sin, start_pos, cache)
        x = x + self.drop(att)
        x = x + self.drop(self.ff(self.norm2(x)))
        return x, next_cache


class Qwen3(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = RMSNorm(cfg["emb_dim"], cfg["eps"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        if cfg["tied"]:
            self.out_head.weight = self.tok_emb.weight

    def forward(self, input_ids: Tensor, kv_caches=None, start_pos: int = 0):
        """-> logits, kv_caches. Tokens stand at start_pos and after; start_pos is the length of the caches."""
        t = input_ids.shape[1]
        if start_pos + t > self.cfg["context_length"]:
            raise ValueError(f"context length {self.cfg['context_length']} exceeded: {start_pos + t}")
        positions = torch.arange(start_pos, start_pos + t, device=input_ids.device)
        cos, sin = rope_angles(self.blocks[0].att.head_dim, positions, self.cfg["rope_base"])
        x = self.tok_emb(input_ids)
        next_caches = []
        for i, block in enumerate(self.blocks):
            cache = kv_caches[i] if kv_caches is not None else None
            x, next_cache = block(x, cos, sin, start_pos, cache)
            next_caches.append(next_cache)
        return self.out_head(self.final_norm(x)), next_caches

    def loss(self, input_ids, labels):
        """labels are the input_ids again with -100 where the loss should not look; shifted in here. Sum and count."""
        logits, _ = self(input_ids)
        logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, eos_id=None, seed=None):
        """The prompt and up to max_new_tokens more. A finished row repeats eos_id, all finished ends it."""
        if input_ids.shape[1] + max_new_tokens > self.cfg["context_length"]:
            raise ValueError("does not fit into the context")
        before = self.training
        self.eval()
        gen = torch.Generator(device=input_ids.device)
        gen.manual_seed(seed) if seed is not None else gen.seed()
        done = torch.zeros(input_ids.shape[0], 1, dtype=torch.bool, device=input_ids.device)
        caches, pos, feed = None, 0, input_ids
        for _ in range(max_new_tokens):
            logits, caches = self(feed, caches, pos)
            pos += feed.shape[1]
            nxt = pick(logits[:, -1], temperature, top_k, top_p, gen)
            if eos_id is not None:
                nxt = torch.where(done, eos_id, nxt)
                done = done | (nxt == eos_id)
            input_ids = torch.cat([input_ids, nxt], dim=1)
            if done.all():
                break
            feed = nxt
        self.train(before)
        return input_ids


def pick(logits, temperature, top_k, top_p, gen):
    """(B, V) -> (B, 1)"""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.double() / temperature
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = torch.where(logits < smallest, -math.inf, logits)
    probs = torch.softmax(logits, dim=-1)
    if top_p is not None:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        keep = sorted_probs.cumsum(dim=-1) - sorted_probs < top_p
        keep[:, 0] = True
        probs = torch.zeros_like(probs).scatter(1, order, sorted_probs * keep)
    return torch.multinomial(probs, 1, generator=gen)


def train_step(model, optimizer, micro_batches):
    """One step over several (input_ids, labels), as if they were one batch."""
    model.train()
    optimizer.zero_grad()
    n = sum((labels[:, 1:] != -100).sum() for _, labels in micro_batches).clamp(min=1)
    total = 0.0
    for input_ids, labels in micro_batches:
        summed, _ = model.loss(input_ids, labels)
        (summed / n).backward()
        total += summed.item()
    optimizer.step()
    return total / int(n)


def save(model, path):
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(model.cfg, f)
    weights = {name.replace("_orig_mod.", ""): w for name, w in model.state_dict().items()}
    torch.save(weights, os.path.join(path, "model.pt"))


def load(path):
    with open(os.path.join(path, "config.json")) as f:
        model = Qwen3(json.load(f))
    model.load_state_dict(torch.load(os.path.join(path, "model.pt"), weights_only=True))
    return model


def build(config):
    return Qwen3(
        {
            "vocab_size": config.vocab_size,
            "context_length": config.max_seq_len,
            "emb_dim": config.hidden_size,
            "n_heads": config.num_heads,
            "n_layers": config.num_layers,
            "hidden_dim": config.intermediate_size,
            "n_kv_groups": config.num_kv_heads,
            "rope_base": config.rope_theta,
            "eps": config.rms_norm_eps,
            "drop_rate": config.dropout,
            "tied": config.tie_word_embeddings,
        }
    )
