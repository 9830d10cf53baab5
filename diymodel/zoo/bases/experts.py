"""As in DeepSeek's small models: a shared expert and one of several others, scored by sigmoids; no cache, and a greedy
``generate`` that writes each row's new tokens right behind its own prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoE(nn.Module):
    def __init__(self, dim: int, inter_dim: int, n_routed: int = 3, n_active: int = 1) -> None:
        super().__init__()
        self.n_active = n_active
        self.gate = nn.Parameter(torch.empty(n_routed, dim).normal_(std=dim**-0.5))
        self.w_in = nn.Parameter(torch.empty(n_routed, dim, inter_dim).normal_(std=dim**-0.5))
        self.w_out = nn.Parameter(torch.empty(n_routed, inter_dim, dim).normal_(std=inter_dim**-0.5))
        self.shared = nn.Sequential(nn.Linear(dim, inter_dim), nn.GELU(), nn.Linear(inter_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(F.linear(x, self.gate))
        kept, indices = scores.topk(self.n_active, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, indices, kept)
        hidden = F.gelu(torch.einsum("btd,edf->btef", x, self.w_in))
        routed = torch.einsum("btef,efd,bte->btd", hidden, self.w_out, weights)
        return self.shared(x) + routed


class ExpertsBlock(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.n_heads, dim = args.num_heads, args.hidden_size
        self.attn_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.moe = MoE(dim, args.intermediate_size)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        bsz, seqlen, dim = x.shape
        qkv = self.in_proj(self.attn_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.view(bsz, seqlen, self.n_heads, -1).transpose(1, 2) for part in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out_proj(out.transpose(1, 2).reshape(bsz, seqlen, dim)))
        return x + self.dropout(self.moe(self.ffn_norm(x)))


class Experts(nn.Module):
    """(tokens, lengths) -> logits; and generate(tokens, max_new_tokens, prompt_lens)."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.max_seq_len = args.max_seq_len
        self.embed = nn.Embedding(args.vocab_size, args.hidden_size)
        self.pos = nn.Embedding(args.max_seq_len, args.hidden_size)
        self.layers = nn.ModuleList([ExpertsBlock(args) for _ in range(args.num_layers)])
        self.norm = nn.LayerNorm(args.hidden_size)
        self.head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        seqlen = tokens.size(1)
        if seqlen > self.max_seq_len:
            raise ValueError(f"sequence length {seqlen} exceeds {self.max_seq_len}")
        h = self.embed(tokens)
        if lengths is not None:
            h = h.masked_fill((torch.arange(seqlen, device=tokens.device) >= lengths[:, None])[..., None], 0.0)
        h = h + self.pos(torch.arange(seqlen, device=tokens.device))
        for layer in self.layers:
            h = layer(h)
        logits: Tensor = self.head(self.norm(h))
        return logits

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, prompt_lens: Tensor | None = None) -> Tensor:
        bsz, longest = tokens.shape
        total = longest + max_new_tokens
        if total > self.max_seq_len:
            raise ValueError(f"{total} tokens do not fit in {self.max_seq_len}")
        lens = torch.full((bsz,), longest, device=tokens.device) if prompt_lens is None else prompt_lens.clone()
        tokens = F.pad(tokens, (0, max_new_tokens))
        modes = {part: part.training for part in self.modules()}
        self.eval()
        while int(lens.min()) < total:
            logits = self(tokens[:, : int(lens.max())])
            row = torch.arange(bsz, device=tokens.device)
            new = logits[row, lens - 1].argmax(dim=-1)
            going = lens < total
            tokens[row[going], lens[going]] = new[going]
            lens = lens + going.long()
        for part, training in modes.items():
            part.training = training
        return tokens
