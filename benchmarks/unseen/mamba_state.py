"""A small Mamba-2: causal depthwise convolution, then a state space with one decay a head, computed in chunks.

`model(tokens)` gives (logits, state); `model(tokens, state)` goes on from there. A state is a value, and of one size
however long the text was: for each layer the last inputs of the convolution, and a matrix a head.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x, z=None):
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if z is not None:
            x = x * F.silu(z.to(x.dtype))
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(dtype) * self.weight


def segsum(x):
    """x (..., T) -> (..., T, T): sum of x over j < k <= i, and -inf above the diagonal."""
    total = x.cumsum(-1)
    out = total[..., :, None] - total[..., None, :]
    seen = torch.ones(x.size(-1), x.size(-1), dtype=torch.bool, device=x.device).tril()
    return out.masked_fill(~seen, float("-inf"))


def ssd(x, log_a, B, C, chunk_size, h):
    """h_t = a_t h_{t-1} + x_t B_t^T, y_t = h_t C_t, a chunk at a time.

    x: (b, t, heads, p), log_a: (b, t, heads), B, C: (b, t, n), h: (b, heads, p, n) -> y like x, and the last h
    """
    ys = []
    for s in range(0, x.size(1), chunk_size):
        xc, Bc, Cc = x[:, s : s + chunk_size], B[:, s : s + chunk_size], C[:, s : s + chunk_size]
        a = log_a[:, s : s + chunk_size].transpose(1, 2)  # (b, heads, l)
        total = a.cumsum(-1)
        # within the chunk
        L = segsum(a).exp()
        y = torch.einsum("bln,bsn,bhls,bshp->blhp", Cc, Bc, L, xc)
        # what came before it
        y = y + torch.einsum("bln,bhpn,bhl->blhp", Cc, h, total.exp())
        # and what goes on
        rest = (total[..., -1:] - total).exp()
        h = h * total[..., -1].exp()[..., None, None] + torch.einsum("bsn,bhs,bshp->bhpn", Bc, rest, xc)
        ys.append(y)
    return torch.cat(ys, dim=1), h


class Mixer(nn.Module):
    def __init__(self, config, d_state=4, d_conv=3, chunk_size=4):
        super().__init__()
        self.d = config.hidden_size
        self.heads = config.num_heads
        self.d_state, self.d_conv, self.chunk_size = d_state, d_conv, chunk_size
        self.d_xbc = self.d + 2 * d_state
        self.in_proj = nn.Linear(self.d, self.d + self.d_xbc + self.heads, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(self.d_xbc, 1, d_conv) * d_conv**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.d_xbc))
        self.dt_bias = nn.Parameter(torch.linspace(-3.0, 0.0, self.heads))
        self.A_log = nn.Parameter(torch.linspace(0.0, 1.0, self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.d, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.d, self.d, bias=False)

    def forward(self, u, conv_state, h):
        b, t, _ = u.shape
        z, xbc, dt = self.in_proj(u).split([self.d, self.d_xbc, self.heads], dim=-1)

        xbc = torch.cat([conv_state, xbc], dim=1)  # d_conv - 1 inputs from before
        conv_state = xbc[:, -(self.d_conv - 1) :]
        xbc = F.conv1d(xbc.transpose(1, 2), self.conv_weight, self.conv_bias, groups=self.d_xbc).transpose(1, 2)
        x, B, C = F.silu(xbc).split([self.d, self.d_state, self.d_state], dim=-1)

        dt = F.softplus(dt + self.dt_bias)
        log_a = -dt * self.A_log.exp()
        x = x.reshape(b, t, self.heads, self.d // self.heads)
        y, h = ssd(x * dt[..., None], log_a, B, C, self.chunk_size, h)
        y = y + x * self.D[:, None]
        y = self.norm(y.reshape(b, t, self.d), z)
        return self.out_proj(y), conv_state, h


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = Mixer(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, conv_state, h):
        y, conv_state, h = self.mixer(self.norm(x), conv_state, h)
        return x + self.dropout(y), conv_state, h


class MambaLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm_f = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.grad_ckpt = False

    def gradient_checkpointing_enable(self):
        self.grad_ckpt = True

    def allocate_state(self, batch_size):
        w, m = self.embedding.weight, self.layers[0].mixer
        return [
            (
                w.new_zeros(batch_size, m.d_conv - 1, m.d_xbc),
                w.new_zeros(batch_size, m.heads, m.d // m.heads, m.d_state),
            )
            for _ in self.layers
        ]

    def forward(self, tokens, state=None, targets=None):
        """targets[t] is the token after tokens[t], -100 where there is none: then (logits, state, mean loss)."""
        if state is None:
            state = self.allocate_state(tokens.size(0))
        x = self.embedding(tokens)
        new_state = []
        for layer, (conv_state, h) in zip(self.layers, state):
            if self.grad_ckpt and self.training:
                x, conv_state, h = checkpoint(layer, x, conv_state, h, use_reentrant=False)
            else:
                x, conv_state, h = layer(x, conv_state, h)
            new_state.append((conv_state, h))
        logits = self.lm_head(self.norm_f(x))
        if targets is None:
            return logits, new_state
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = wide.logsumexp(-1) - wide.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        counted = (targets != -100).to(nll.dtype)
        return logits, new_state, (nll * counted).sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, tokens, n_new, temperature=1.0, stop_token=None, seed=None):
        """tokens and n_new more; a row that has met stop_token repeats it. Temperature 0 takes the likeliest."""
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        g = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        logits, state = self(tokens)
        stopped = torch.zeros(tokens.size(0), 1, dtype=torch.bool, device=tokens.device)
        for i in range(n_new):
            if i > 0:
                logits, state = self(tokens[:, -1:], state)
            if temperature == 0:
                new = logits[:, -1].argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits[:, -1].double() / temperature).softmax(-1), 1, generator=g)
            if stop_token is not None:
                new = new.masked_fill(stopped, stop_token)
                stopped = stopped | (new == stop_token)
            tokens = torch.cat([tokens, new], dim=1)
        for m, mode in modes:
            m.training = mode
        return tokens
