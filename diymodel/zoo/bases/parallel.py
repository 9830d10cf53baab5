"""As in GPT-J and PaLM: attention and MLP side by side behind one norm, rotary on a part of each head; the state is one
dict of arrays over all layers, handed back by every call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


def apply_rotary(x: Tensor, pos: Tensor, n_rot: int, base: float) -> Tensor:
    """Turn the first ``n_rot`` features of x (b, t, ..., d), neighbours as pairs; the rest stay."""
    inv_freq = base ** -(torch.arange(0, n_rot, 2, dtype=torch.float64, device=x.device) / n_rot)
    theta = torch.einsum("t,f->tf", pos.double(), inv_freq)
    theta = theta.view(1, len(pos), *[1] * (x.dim() - 3), -1)
    sin, cos = theta.sin().to(x.dtype), theta.cos().to(x.dtype)
    rot, keep = x[..., :n_rot], x[..., n_rot:]
    x1, x2 = rot[..., ::2], rot[..., 1::2]
    rot = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)
    return torch.cat((rot, keep), dim=-1)


class ParallelLayer(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        dim, self.n_kv = cfg.hidden_size, cfg.num_kv_heads
        self.group, self.hd = cfg.num_heads // cfg.num_kv_heads, dim // cfg.num_heads
        self.base, self.n_rot = cfg.rope_theta, max(2, self.hd // 2)
        self.pdrop = cfg.dropout
        kv = self.n_kv * self.hd
        self.split = (dim, kv, kv, cfg.intermediate_size)
        self.ln = nn.LayerNorm(dim, eps=cfg.rms_norm_eps)
        self.fused_in = nn.Linear(dim, sum(self.split), bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.ff_out = nn.Linear(cfg.intermediate_size, dim, bias=False)

    def forward(self, x: Tensor, offset: int, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, dim = x.shape
        q, k, v, ff = self.fused_in(self.ln(x)).split(self.split, dim=-1)
        q = q.view(b, t, self.n_kv, self.group, self.hd)
        k, v = k.view(b, t, self.n_kv, self.hd), v.view(b, t, self.n_kv, self.hd)
        pos = torch.arange(offset, offset + t, device=x.device)
        q = apply_rotary(q, pos, self.n_rot, self.base)
        k = apply_rotary(k, pos, self.n_rot, self.base)
        k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
        sim = torch.einsum("bthgd,bshd->bhgts", q, k) * self.hd**-0.5
        causal = torch.ones(t, offset + t, dtype=torch.bool, device=x.device).tril(offset)
        sim = sim.masked_fill(~causal, -torch.finfo(sim.dtype).max)
        attn = F.dropout(sim.softmax(dim=-1), self.pdrop, self.training)
        out = torch.einsum("bhgts,bshd->bthgd", attn, v).reshape(b, t, dim)
        update = self.attn_out(out) + self.ff_out(F.gelu(ff))
        return x + F.dropout(update, self.pdrop, self.training), k, v


class ParallelLM(nn.Module):
    """(tokens, state) -> (logits, state); state is {"k": ..., "v": ...}, each (layer, b, s, head, d)."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList([ParallelLayer(cfg) for _ in range(cfg.num_layers)])
        self.ln_f = nn.LayerNorm(cfg.hidden_size)
        self.unembed = nn.Linear(cfg.hidden_size, cfg.vocab_size)
        if cfg.tie_word_embeddings:
            self.unembed.weight = self.wte.weight

    def configure_optimizers(self, train_config: Any) -> torch.optim.Optimizer:
        names = {name for name, _ in self.named_parameters()}
        decay = {name for name in names if name.endswith("weight") and "ln" not in name}
        by_name = dict(self.named_parameters())
        groups = [
            {"params": [by_name[name] for name in sorted(decay)], "weight_decay": train_config.weight_decay},
            {"params": [by_name[name] for name in sorted(names - decay)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas)

    def empty(self, b: int) -> State:
        shape = (self.cfg.num_layers, b, 0, self.cfg.num_kv_heads, self.cfg.hidden_size // self.cfg.num_heads)
        return {name: self.ln_f.weight.new_zeros(shape) for name in ("k", "v")}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        b, t = tokens.shape
        state = self.empty(b) if state is None else state
        offset = state["k"].shape[2]
        if offset + t > self.cfg.max_seq_len:
            raise ValueError(f"sequence of {offset + t} exceeds max_seq_len {self.cfg.max_seq_len}")
        x = self.wte(tokens)
        ks, vs = [], []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, offset, state["k"][i], state["v"][i])
            ks.append(k)
            vs.append(v)
        return self.unembed(self.ln_f(x)), {"k": torch.stack(ks), "v": torch.stack(vs)}
