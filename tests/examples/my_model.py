"""A small rotary language model with a KV cache, as one would write it from memory."""

import torch
import torch.nn.functional as F
from torch import nn


def rope(x, position):
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat((x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()), -1)


class LM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, h = config.num_heads, config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, h)
        self.qkv = nn.ModuleList(nn.Linear(h, 3 * h) for _ in range(config.num_layers))
        self.out = nn.ModuleList(nn.Linear(h, h) for _ in range(config.num_layers))
        self.head = nn.Linear(h, config.vocab_size)

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        B, T = input_ids.shape
        P = past_key_values[0][0].shape[2] if past_key_values else 0
        position = torch.arange(P, P + T, device=input_ids.device)
        x, new = self.embed(input_ids), []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out)):
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            q, k = rope(q, position), rope(k, position)
            if past_key_values:
                k, v = (torch.cat(pair, 2) for pair in zip(past_key_values[i], (k, v)))
            new.append((k, v))
            mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
            x = x + out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, -1))
        return (self.head(x), new) if use_cache else self.head(x)
