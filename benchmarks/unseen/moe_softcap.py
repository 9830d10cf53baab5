"""Mixture-of-experts LM: top-2 routing, rotary positions, soft-capped logits, packed documents, cache = list of dicts."""
import math

import torch
from torch import nn
from torch.nn import functional as F


class Rotary(nn.Module):
    # pairs are neighbours: (x0, x1), (x2, x3), ...
    def __init__(self, dim, base):
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x, pos):
        # x [B, T, H, D], pos [B or 1, T]
        freq = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float64) / self.dim)
        ang = pos[..., None].to(torch.float64) * freq
        cos, sin = ang.cos()[:, :, None].to(x.dtype), ang.sin()[:, :, None].to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return (h * (h.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.g


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads, self.dim = cfg.num_heads, cfg.hidden_size // cfg.num_heads
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size, bias=False)
        self.proj = nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False)
        self.rotary = Rotary(self.dim, cfg.rope_theta)
        self.attn_drop = cfg.dropout

    def forward(self, x, pos, mask, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.dim).unbind(2)
        q, k = self.rotary(q, pos), self.rotary(k, pos)
        if cache is not None:
            k = torch.cat([cache["k"], k], dim=1)
            v = torch.cat([cache["v"], v], dim=1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), {"k": k, "v": v}


class Expert(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.up, self.gate = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """Each token goes to its two best experts, whose weights add up to 1. No token is ever dropped."""

    def __init__(self, dim, inner, n_experts=4, top_k=2):
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.experts = nn.ModuleList([Expert(dim, inner) for _ in range(n_experts)])

    def forward(self, x):
        B, T, C = x.shape
        flat = x.reshape(-1, C)
        probs = self.router(flat).softmax(dim=-1)
        weight, chosen = probs.topk(self.top_k, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            row, nth = (chosen == e).nonzero(as_tuple=True)
            if len(row) > 0:
                out = out.index_add(0, row, expert(flat[row]) * weight[row, nth].unsqueeze(-1))
        # load balancing: share of the tokens times mean probability
        share = F.one_hot(chosen, self.n_experts).to(probs.dtype).sum(1).mean(0) / self.top_k
        aux = self.n_experts * (share * probs.mean(0)).sum()
        return out.view(B, T, C), aux


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln1, self.attn = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps), Attention(cfg)
        self.ln2, self.moe = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps), MoE(cfg.hidden_size, 2 * cfg.hidden_size)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, pos, mask, cache=None):
        a, new_cache = self.attn(self.ln1(x), pos, mask, cache)
        x = x + self.drop(a)
        m, aux = self.moe(self.ln2(x))
        return x + self.drop(m), aux, new_cache


class MoELM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.cap = 15.0
        self.wte = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.num_layers)])
        self.ln_f = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02 / math.sqrt(2 * cfg.num_layers) if name.endswith(("proj.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, input_ids, cache=None, labels=None, doc_ids=None):
        """dict with logits, cache, aux_loss, and loss where there are labels (labels[t] is input_ids[t], -100: no target).
        doc_ids (B, T) numbers packed documents 0, 1, ... from the left: none sees another, each starts at position 0."""
        B, T = input_ids.shape
        start = cache[0]["k"].shape[1] if cache is not None else 0
        if start + T > self.cfg.max_seq_len:
            raise ValueError(f"{start + T} tokens do not fit into {self.cfg.max_seq_len}")
        pos = torch.arange(start, start + T, device=input_ids.device)[None]
        mask = (torch.arange(start + T, device=input_ids.device)[None] <= pos[0][:, None])[None, None]
        if doc_ids is not None:
            if cache is not None:
                raise ValueError("packed documents have no cache")
            first = (doc_ids[:, :, None] == doc_ids[:, None, :]).long().argmax(-1)  # where its document begins
            pos = pos - first
            mask = mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])

        h = self.wte(input_ids)
        aux_loss, new_cache = 0.0, []
        for i, block in enumerate(self.blocks):
            h, aux, layer_cache = block(h, pos, mask, cache[i] if cache is not None else None)
            aux_loss = aux_loss + aux
            new_cache.append(layer_cache)
        logits = self.head(self.ln_f(h))
        logits = self.cap * torch.tanh(logits / self.cap)
        out = {"logits": logits, "cache": new_cache, "aux_loss": aux_loss / len(self.blocks)}
        if labels is not None:
            z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            y = labels[:, 1:]
            losses = F.cross_entropy(z.transpose(1, 2), y, ignore_index=-100, reduction="none")
            out["loss"] = losses.sum() / (y != -100).sum().clamp(min=1)
        return out

    def configure_optimizer(self, lr=3e-4, weight_decay=0.1):
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
        )

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        if input_ids.shape[1] + max_new_tokens > self.cfg.max_seq_len:
            raise ValueError(f"prompt and new tokens are more than {self.cfg.max_seq_len}")
        mode = self.training
        self.eval()
        out, cache = input_ids, None
        for _ in range(max_new_tokens):
            step = self(out if cache is None else out[:, -1:], cache=cache)
            cache, logits = step["cache"], step["logits"][:, -1].double()
            if temperature == 0:
                nxt = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kept, idx = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
                    nxt = idx.gather(-1, torch.multinomial(kept.softmax(-1), 1, generator=generator))
                else:
                    nxt = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            out = torch.cat([out, nxt], dim=1)
        self.train(mode)
        return out
