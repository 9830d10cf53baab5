"""As in Mistral: each layer sees a window, and the cache is a value that keeps no more than the window, the newest
tokens at its end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 2


class Rolled(NamedTuple):
    """A cache: how many tokens were seen, and of each layer the keys and values of the last WINDOW - 1."""

    seen: int
    layers: tuple[tuple[Tensor, Tensor], ...]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return self._norm(wide).type_as(x) * self.g


def rope(x: Tensor, freqs: Tensor) -> Tensor:
    """x (B, T, H, D) by freqs (T, D / 2), complex."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[None, :, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.head_dim = args.hidden_size // args.num_heads
        self.n_heads, self.n_kv_heads = args.num_heads, args.num_kv_heads
        self.wq = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.wkv = nn.Linear(args.hidden_size, 2 * self.n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(args.hidden_size, args.hidden_size, bias=False)

    def forward(self, x: Tensor, freqs: Tensor, kept: tuple[Tensor, Tensor] | None) -> Any:
        bs, t, _ = x.shape
        xq = self.wq(x).view(bs, t, self.n_heads, self.head_dim)
        xk, xv = self.wkv(x).view(bs, t, 2, self.n_kv_heads, self.head_dim).unbind(2)
        xq, xk = rope(xq, freqs), rope(xk, freqs)
        if kept is not None:
            xk, xv = torch.cat([kept[0], xk], 1), torch.cat([kept[1], xv], 1)
        s = xk.shape[1]
        gap = torch.arange(s - t, s, device=x.device)[:, None] - torch.arange(s, device=x.device)[None]
        mask = (gap >= 0) & (gap < WINDOW)
        n_rep = self.n_heads // self.n_kv_heads
        keys = xk[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)
        values = xv[:, :, :, None].expand(-1, -1, -1, n_rep, -1).flatten(2, 3)
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        out = F.scaled_dot_product_attention(xq, keys, values, attn_mask=mask)
        out = self.wo(out.transpose(1, 2).reshape(bs, t, -1))
        return out, (xk[:, -(WINDOW - 1) :], xv[:, -(WINDOW - 1) :])


class RollingBlock(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.w1, self.w3 = (nn.Linear(args.hidden_size, args.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self.attention_norm, self.ffn_norm = (RMSNorm(args.hidden_size, args.rms_norm_eps) for _ in range(2))
        self.drop = nn.Dropout(args.dropout)

    def forward(self, x: Tensor, freqs: Tensor, kept: tuple[Tensor, Tensor] | None) -> Any:
        r, kept = self.attention(self.attention_norm(x), freqs, kept)
        h = x + self.drop(r)
        z = self.ffn_norm(h)
        return h + self.drop(self.w2(F.silu(self.w1(z)) * self.w3(z))), kept


class Rolling(nn.Module):
    """(tokens, cache, use_cache) -> logits or (logits, Rolled); there is no longest sequence."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleList(RollingBlock(args) for _ in range(args.num_layers))
        self.norm = RMSNorm(args.hidden_size, args.rms_norm_eps)
        self.output = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def freqs_cis(self, start: int, end: int) -> Tensor:
        dim = self.args.hidden_size // self.args.num_heads
        device = self.output.weight.device
        inv = 1.0 / self.args.rope_theta ** (torch.arange(0, dim, 2, device=device).double() / dim)
        angle = torch.outer(torch.arange(start, end, device=device).double(), inv)
        return torch.polar(torch.ones_like(angle), angle)

    def forward(self, tokens: Tensor, cache: Rolled | None = None, use_cache: bool = False, first: int = 0) -> Any:
        seen = first if cache is None else cache.seen
        h, freqs, layers = self.tok_embeddings(tokens), self.freqs_cis(seen, seen + tokens.shape[1]), []
        for i, layer in enumerate(self.layers):
            h, kept = layer(h, freqs, None if cache is None else cache.layers[i])
            layers.append(kept)
        logits = self.output(self.norm(h))
        return (logits, Rolled(seen + tokens.shape[1], tuple(layers))) if use_cache else logits


def shifted(model: Rolling, tokens: Tensor, offset: int) -> Tensor:
    logits: Tensor = model(tokens, first=offset)
    return logits
