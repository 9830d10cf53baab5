"""With a directory of its own format, activation checkpointing, a vocabulary that grows, and one table that embeds and
is the head as well; the cache is a list of tensors, keys and values in one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KEYS = ("vocab_size", "num_layers", "hidden_size", "num_heads", "intermediate_size", "max_seq_len", "dropout")


class KeptBlock(nn.Module):
    def __init__(self, hp: Any) -> None:
        super().__init__()
        width, self.heads, self.dropout = hp.hidden_size, hp.num_heads, hp.dropout
        self.attn_norm, self.ff_norm = nn.LayerNorm(width, hp.norm_eps), nn.LayerNorm(width, hp.norm_eps)
        self.att_proj, self.attn_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff_proj, self.ff_out = nn.Linear(width, hp.intermediate_size), nn.Linear(hp.intermediate_size, width)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, length, width = x.shape
        q, kv = self.att_proj(self.attn_norm(x)).split((width, 2 * width), -1)
        q = q.view(rows, length, self.heads, -1).transpose(1, 2)
        kv = kv.view(rows, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            kv = torch.cat((past, kv), 3)
        k, v = kv.unbind()
        before = k.shape[2] - length
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=x.device).tril(before)
        att = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        x = x + F.dropout(self.attn_out(att.transpose(1, 2).flatten(2)), self.dropout, self.training)
        hidden = F.gelu(self.ff_proj(self.ff_norm(x)))
        return x + F.dropout(self.ff_out(hidden), self.dropout, self.training), kv


class Kept(nn.Module):
    """(input_ids, past_key_values, use_cache) -> logits, or (logits, [stacked keys and values, …])."""

    def __init__(self, hp: Any) -> None:
        super().__init__()
        eps = getattr(hp, "norm_eps", getattr(hp, "rms_norm_eps", 1e-5))
        self.hp = SimpleNamespace(**{key: getattr(hp, key) for key in KEYS}, norm_eps=eps)
        self.wte = nn.Embedding(hp.vocab_size, hp.hidden_size)
        self.wpe = nn.Embedding(hp.max_seq_len, hp.hidden_size)
        self.blocks = nn.ModuleList(KeptBlock(self.hp) for _ in range(hp.num_layers))
        self.ln_f = nn.LayerNorm(hp.hidden_size, eps)
        self.activation_checkpointing = False
        self.apply(self.init_weights)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def activation_checkpointing_enable(self) -> None:
        self.activation_checkpointing = True

    def resize_token_embeddings(self, new_size: int) -> None:
        old = self.wte.weight.detach()
        fresh = nn.Embedding(new_size, self.hp.hidden_size).to(old)
        self.init_weights(fresh)
        with torch.no_grad():
            fresh.weight[: self.hp.vocab_size] = old[:new_size]
        self.wte = fresh
        self.hp.vocab_size = new_size

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        start = 0 if past_key_values is None else past_key_values[0].shape[3]
        end = start + input_ids.shape[1]
        if end > self.hp.max_seq_len:
            raise ValueError(f"position {end} is beyond max_seq_len={self.hp.max_seq_len}")
        x = self.wte(input_ids) + self.wpe(torch.arange(start, end, device=input_ids.device))
        presents = []
        for i, block in enumerate(self.blocks):
            past = None if past_key_values is None else past_key_values[i]
            if self.activation_checkpointing and self.training:
                x, kv = checkpoint(block, x, past, use_reentrant=False)
            else:
                x, kv = block(x, past)
            presents.append(kv)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return (logits, presents) if use_cache else logits


def save_pretrained(model: Any, folder: Path) -> None:
    while not isinstance(model, Kept):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hp.json").write_text(json.dumps(vars(model.hp)))
    torch.save(model.state_dict(), folder / "weights.pt")


def from_pretrained(folder: Path) -> Kept:
    weights = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    model = Kept(SimpleNamespace(**json.loads((folder / "hp.json").read_text())))
    model.to(weights["wte.weight"].dtype).load_state_dict(weights, strict=True)
    return model.eval()
