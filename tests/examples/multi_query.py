"""Multi-query attention, learned positions, a mutable cache class, SiLU; labels shifted inside."""
import torch
import torch.nn.functional as F
from torch import nn


class Memory:
    def __init__(self, layers):
        self.store = [None] * layers

    def __len__(self):
        return 0 if self.store[0] is None else self.store[0][0].shape[1]

    def push(self, i, k, v):
        if self.store[i] is not None:
            k, v = torch.cat((self.store[i][0], k), 1), torch.cat((self.store[i][1], v), 1)
        self.store[i] = (k, v)
        return k, v


class Layer(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.i, self.n = i, c.num_heads
        self.q, self.o = nn.Linear(c.hidden_size, c.hidden_size), nn.Linear(c.hidden_size, c.hidden_size)
        self.kv = nn.Linear(c.hidden_size, 2 * (c.hidden_size // c.num_heads))
        self.a, self.b = nn.LayerNorm(c.hidden_size), nn.LayerNorm(c.hidden_size)
        self.up, self.down = nn.Linear(c.hidden_size, c.intermediate_size), nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, memory):
        h = self.a(x)
        q = torch.stack(self.q(h).chunk(self.n, -1), 1)
        k, v = self.kv(h).chunk(2, -1)
        if memory is not None:
            k, v = memory.push(self.i, k, v)
        s = q @ k[:, None].transpose(-1, -2) / q.shape[-1] ** 0.5
        T, S = s.shape[-2:]
        s = s + torch.full((T, S), float("-inf"), dtype=s.dtype, device=s.device).triu(S - T + 1)
        y = s.softmax(-1) @ v[:, None]
        x = x + self.o(torch.cat(y.unbind(1), -1))
        return x + self.down(F.silu(self.up(self.b(x))))


class MultiQuery(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.tok, self.pos = nn.Embedding(c.vocab_size, c.hidden_size), nn.Embedding(c.max_seq_len, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_layers))
        self.head = nn.Linear(c.hidden_size, c.vocab_size)

    def forward(self, input_ids, labels=None, cache=None, use_cache=False):
        if use_cache and cache is None:
            cache = Memory(len(self.layers))
        start = 0 if cache is None else len(cache)
        x = self.tok(input_ids) + self.pos.weight[start : start + input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cache)
        out = {"logits": self.head(x)}
        if labels is not None:
            out["loss"] = F.cross_entropy(out["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if cache is not None:
            out["past_key_values"] = cache
        return out
