"""A hybrid in the spirit of Griffin: blocks of gated linear recurrence, and now and then one of attention with ALiBi.

The state is a list with a dict for every block: what the convolution and the recurrence carry over, or keys and values.
"""

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HybridOutput(NamedTuple):
    logits: Tensor
    state: list
    loss: Optional[Tensor] = None


class CausalConv1d(nn.Module):
    """Depthwise, over time. Sees the current input and the kernel_size - 1 before it."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(width, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.uniform_(self.weight, -1 / math.sqrt(kernel_size), 1 / math.sqrt(kernel_size))

    def forward(self, x: Tensor, carried: Optional[Tensor]):
        if carried is None:
            carried = x.new_zeros(x.size(0), self.kernel_size - 1, x.size(2))
        x = torch.cat((carried, x), dim=1)
        y = F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=x.size(2)).transpose(1, 2)
        return y, x[:, x.size(1) - (self.kernel_size - 1) :]


class GatedRecurrence(nn.Module):
    """h[t] = a[t] * h[t-1] + sqrt(1 - a[t]^2) * i[t] * x[t], for all t at once."""

    C = 8.0

    def __init__(self, width: int):
        super().__init__()
        self.input_gate = nn.Linear(width, width)
        self.decay_gate = nn.Linear(width, width)
        # softplus(rate) such that a^C lies between 0.9 and 0.999
        a = torch.empty(width).uniform_(0.9, 0.999)
        self.rate = nn.Parameter(torch.log(torch.expm1(-torch.log(a) / self.C)))

    def forward(self, x: Tensor, h: Optional[Tensor]):
        log_a = -self.C * F.softplus(self.rate) * torch.sigmoid(self.decay_gate(x))  # (B, T, W), below 0
        u = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(self.input_gate(x)) * x
        if x.size(1) == 1:
            if h is not None:
                u = u + log_a.exp() * h[:, None]
            return u, u[:, -1]
        total = log_a.cumsum(dim=1)
        decay = total[:, :, None] - total[:, None, :]  # (B, T, S, W), from s to t
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        decay = decay.masked_fill(later[None, :, :, None], float("-inf")).exp()
        y = torch.einsum("btsw,bsw->btw", decay, u)
        if h is not None:
            y = y + total.exp() * h[:, None]
        return y, y[:, -1]


class RecurrentMixer(nn.Module):
    def __init__(self, d_model: int, kernel_size: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_model)
        self.conv = CausalConv1d(d_model, kernel_size)
        self.rnn = GatedRecurrence(d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, state: Optional[dict]):
        state = state or {}
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x, conv = self.conv(x, state.get("conv"))
        x, h = self.rnn(x, state.get("h"))
        return self.out_proj(x * F.gelu(gate)), {"conv": conv, "h": h}


class AlibiAttention(nn.Module):
    """Multi-query: one key and one value for all heads."""

    def __init__(self, d_model: int, n_heads: int, dropout: float):
        super().__init__()
        if d_model % n_heads:
            raise ValueError("d_model must be a multiple of n_heads")
        self.n_heads, self.head_dim, self.dropout = n_heads, d_model // n_heads, dropout
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * self.head_dim, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        slopes = 2.0 ** (-8.0 * torch.arange(1, n_heads + 1) / n_heads)
        self.register_buffer("slopes", slopes.view(n_heads, 1, 1))

    def forward(self, x: Tensor, state: Optional[dict]):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv_proj(x).chunk(2, dim=-1)
        if state is not None:
            k = torch.cat((state["k"], k), dim=1)
            v = torch.cat((state["v"], v), dim=1)
        S = k.size(1)
        distance = torch.arange(S - T, S, device=x.device)[:, None] - torch.arange(S, device=x.device)[None, :]
        bias = (-self.slopes * distance.abs()).to(x.dtype).masked_fill(distance < 0, float("-inf"))
        y = F.scaled_dot_product_attention(
            q,
            k[:, None].expand(B, self.n_heads, S, self.head_dim),
            v[:, None].expand(B, self.n_heads, S, self.head_dim),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C)), {"k": k, "v": v}


class HybridBlock(nn.Module):
    def __init__(self, mixer: nn.Module, d_model: int, dropout: float):
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 2 * 3 * d_model)
        self.down = nn.Linear(3 * d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Optional[dict]):
        y, state = self.mixer(self.norm1(x), state)
        x = x + self.dropout(y)
        a, b = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.gelu(a) * b)), state


class HybridLM(nn.Module):
    def __init__(self, vocab_size, d_model=64, n_layers=4, n_heads=4, kernel_size=4, attention_every=2, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList()
        for i in range(n_layers):
            if i % attention_every == attention_every - 1:
                mixer = AlibiAttention(d_model, n_heads, dropout)
            else:
                mixer = RecurrentMixer(d_model, kernel_size)
            self.blocks.append(HybridBlock(mixer, d_model, dropout))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens, state=None, targets=None):
        """tokens: (B, T). state: what the call before returned. targets: (B, T), the tokens that follow, or -100."""
        x = self.embedding(tokens)
        new_state = []
        for i, block in enumerate(self.blocks):
            x, s = block(x, None if state is None else state[i])
            new_state.append(s)
        logits = self.head(self.norm(x))
        if targets is None:
            return HybridOutput(logits, new_state)
        counted = targets != -100
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
        return HybridOutput(logits, new_state, losses.sum() / counted.sum().clamp(min=1))

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, temperature=1.0, top_k=None, eos_id=None, seed=None):
        """(B, T) -> (B, T + new). After a row's eos_id only eos_id follows."""
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        rng = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
        out, state = self(prompt)[:2]
        tokens = [prompt]
        ended = torch.zeros(prompt.size(0), 1, dtype=torch.bool, device=prompt.device)
        for i in range(max_new_tokens):
            logits = out[:, -1]
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None and top_k < logits.size(-1):
                    best = logits.topk(top_k, dim=-1)
                    logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
                token = torch.multinomial(logits.softmax(-1), 1, generator=rng)
            if eos_id is not None:
                token = torch.where(ended, eos_id, token)
                ended = ended | (token == eos_id)
            tokens.append(token)
            if i + 1 == max_new_tokens or (eos_id is not None and bool(ended.all())):
                break
            out, state = self(token, state)[:2]
        for m, mode in modes:
            m.training = mode
        return torch.cat(tokens, dim=1)
