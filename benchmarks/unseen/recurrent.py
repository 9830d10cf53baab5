"""Gated linear attention between token shifts: no attention matrix is kept, a state of fixed size is carried on.

`model(ids, state) -> (logits, state)`; the state is a value, one dict a layer.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def up(x):
    return x if x.dtype == torch.float64 else x.float()


class Shift(nn.Module):
    """A learned mixture, channel by channel, of a token and the one before it."""

    def __init__(self, dim):
        super().__init__()
        self.mix = nn.Parameter(torch.full((dim,), 0.4))

    def forward(self, x, last):
        before = torch.cat([last[:, None], x[:, :-1]], dim=1)
        return torch.lerp(x, before, self.mix.to(x.dtype)), x[:, -1]


class TimeMix(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.shift = Shift(dim)
        self.r, self.k, self.v, self.g = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.decay = nn.Linear(dim, heads)
        self.gain = nn.Parameter(torch.ones(dim))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, last, memory):
        B, T, D = x.shape
        x, last = self.shift(x, last)
        r, k, v = (up(p(x)).view(B, T, self.heads, self.size).transpose(1, 2) for p in (self.r, self.k, self.v))
        k = k * self.size**-0.5
        w = F.logsigmoid(up(self.decay(x)) + 2).transpose(1, 2)  # log of what is kept at each step, (B, H, T)
        if T == 1:
            memory = memory * w.exp()[..., None] + k.transpose(2, 3) @ v
            y = r @ memory
        else:
            total = w.cumsum(-1)
            span = total[..., :, None] - total[..., None, :]
            later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            kept = span.masked_fill(later, float("-inf")).exp()
            y = (r @ k.transpose(2, 3) * kept) @ v
            y = y + total.exp()[..., None] * (r @ memory)
            rest = (total[..., -1:] - total).exp()[..., None]
            memory = memory * total[..., -1:, None].exp() + (k * rest).transpose(2, 3) @ v
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        y = y.transpose(1, 2).reshape(B, T, D).to(x.dtype) * self.gain
        return self.out(y * F.silu(self.g(x))), last, memory


class ChannelMix(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.shift = Shift(dim)
        self.a, self.b = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x, last):
        x, last = self.shift(x, last)
        return self.b(F.relu(self.a(x)) ** 2), last


class Cell(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(c.hidden_size), nn.LayerNorm(c.hidden_size)
        self.time = TimeMix(c.hidden_size, c.num_heads)
        self.channel = ChannelMix(c.hidden_size, c.intermediate_size)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, s):
        y, time_last, memory = self.time(self.n1(x), s["time"], s["memory"])
        x = x + self.drop(y)
        y, channel_last = self.channel(self.n2(x), s["channel"])
        return x + self.drop(y), {"time": time_last, "memory": memory, "channel": channel_last}


class Recurrent(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.first_norm = nn.LayerNorm(c.hidden_size)
        self.cells = nn.ModuleList()
        for _ in range(c.num_layers):
            self.cells.append(Cell(c))
        self.last_norm = nn.LayerNorm(c.hidden_size)
        self.readout = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.readout.weight = self.embedding.weight

    def blank(self, rows, like):
        c = self.config
        size = c.hidden_size // c.num_heads
        return {
            "time": like.new_zeros(rows, c.hidden_size),
            "memory": up(like).new_zeros(rows, c.num_heads, size, size),
            "channel": like.new_zeros(rows, c.hidden_size),
        }

    def forward(self, ids, state=None, labels=None):
        x = self.first_norm(self.embedding(ids))
        after = []
        for i, cell in enumerate(self.cells):
            x, new = cell(x, self.blank(len(ids), x) if state is None else state[i])
            after.append(new)
        logits = self.readout(self.last_norm(x))
        if labels is None:
            return logits, after
        score = up(logits[:, :-1]).log_softmax(dim=-1)
        target = labels[:, 1:]
        valid = target.ne(-100)
        picked = score.gather(2, target.masked_fill(~valid, 0).unsqueeze(2)).squeeze(2)
        loss = -picked.masked_fill(~valid, 0.0).sum() / valid.sum().clamp_min(1)
        return logits, after, loss

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_p=None):
        was = self.training
        self.eval()
        logits, state = self(ids)
        for i in range(max_new_tokens):
            if i:
                logits, state = self(ids[:, -1:], state)
            z = up(logits[:, -1])
            if temperature > 0:
                p = (z / temperature).softmax(-1)
                if top_p is not None:
                    ranked, index = p.sort(-1, descending=True)
                    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
                    p = torch.zeros_like(p).scatter(-1, index, ranked)
                token = torch.multinomial(p, 1)
            else:
                token = z.argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), dim=-1)
        self.train(was)
        return ids
