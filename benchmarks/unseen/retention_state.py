"""A retentive network: each head keeps a matrix that decays at its own pace. Rotary phases as in the paper, a token shift
in front of the feed-forward as in RWKV, and a squared ReLU with its own backward.

out = model(tokens); out = model(more, state=out["state"]) continues. A state is a value: nothing in it is ever written to.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        r = x.clamp(min=0)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad):
        (r,) = ctx.saved_tensors
        return grad * 2 * r


def drop(x, p, training):
    """Zero with probability p, and scale up what is left."""
    if not training or p == 0.0:
        return x
    keep = torch.rand_like(x) >= p
    return x * keep / (1.0 - p)


def rotary(x, pos):
    """x (b, h, t, d), pos (t,): channel pairs (0, 1), (2, 3), ... turn by 10000^(-2i/d) a token"""
    d = x.size(-1)
    speed = 10000.0 ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    phase = (pos.to(torch.float64)[:, None] * speed).repeat_interleave(2, dim=-1)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * phase.cos().to(x.dtype) + turned * phase.sin().to(x.dtype)


class Retention(nn.Module):
    def __init__(self, d_model, n_heads, chunk):
        super().__init__()
        self.n_heads, self.d_head, self.chunk = n_heads, d_model // n_heads, chunk
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.register_buffer("log_gamma", torch.log1p(-(2.0 ** -torch.linspace(1.0, 5.0, n_heads))), persistent=True)

    def forward(self, x, pos, memory):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, self.d_head).permute(2, 0, 3, 1, 4)
        q, k = rotary(q, pos), rotary(k, pos) * self.d_head**-0.5
        log_gamma = self.log_gamma.to(x.dtype)
        pieces = []
        for at in range(0, t, self.chunk):
            qc, kc, vc = (z[:, :, at : at + self.chunk] for z in (q, k, v))
            n = qc.size(2)
            i = torch.arange(n, device=x.device)
            gap = (i[:, None] - i[None, :]).clamp(min=0)
            decay = (gap * log_gamma[:, None, None]).exp().tril()
            inner = (qc @ kc.transpose(-1, -2) * decay) @ vc
            cross = (qc @ memory) * ((i + 1)[:, None] * log_gamma[:, None, None]).exp()
            pieces.append(inner + cross)
            left = ((n - 1 - i)[:, None] * log_gamma[:, None, None]).exp()
            memory = memory * (n * log_gamma[:, None, None]).exp() + (kc * left).transpose(-1, -2) @ vc
        y = torch.cat(pieces, dim=2)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)  # each head by itself
        y = y.transpose(1, 2).reshape(b, t, d)
        return self.out(F.silu(self.gate(x)) * y), memory


class ShiftedMLP(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.mix = nn.Parameter(torch.linspace(0.2, 0.8, d_model))
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x, last):
        before = torch.cat((last, x[:, :-1]), dim=1)
        mixed = x * self.mix + before * (1 - self.mix)
        return self.down(SquaredReLU.apply(self.up(mixed))), x[:, -1:]


class Layer(nn.Module):
    def __init__(self, cfg, chunk):
        super().__init__()
        self.ln1 = nn.LayerNorm(cfg.hidden_size)
        self.ln2 = nn.LayerNorm(cfg.hidden_size)
        self.retention = Retention(cfg.hidden_size, cfg.num_heads, chunk)
        self.mlp = ShiftedMLP(cfg.hidden_size, cfg.intermediate_size)
        self.p = cfg.dropout

    def forward(self, x, pos, memory, last):
        y, memory = self.retention(self.ln1(x), pos, memory)
        x = x + drop(y, self.p, self.training)
        y, last = self.mlp(self.ln2(x), last)
        x = x + drop(y, self.p, self.training)
        return x, memory, last


class RetNet(nn.Module):
    def __init__(self, cfg, chunk=4):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg, chunk) for _ in range(cfg.num_layers))
        self.ln_f = nn.LayerNorm(cfg.hidden_size)
        self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.use_checkpoint = False
        self.reset_parameters()
        if cfg.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def reset_parameters(self):
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        for layer in self.layers:
            for w in (layer.retention.qkv, layer.retention.gate, layer.mlp.up):
                nn.init.normal_(w.weight, std=0.02)
            for w in (layer.retention.out, layer.mlp.down):
                nn.init.normal_(w.weight, std=0.02 / math.sqrt(2 * len(self.layers)))

    def gradient_checkpointing_enable(self):
        self.use_checkpoint = True

    def empty_state(self, batch):
        d, h = self.cfg.hidden_size, self.cfg.num_heads
        w = self.embed.weight
        memory = [w.new_zeros(batch, h, d // h, d // h) for _ in self.layers]
        return {"seen": 0, "memory": memory, "last": [w.new_zeros(batch, 1, d) for _ in self.layers]}

    def forward(self, tokens, state=None, labels=None):
        """{"logits", "state"}, and "loss" with labels: the tokens again, -100 at those that are not learned."""
        t = tokens.size(1)
        if state is None:
            state = self.empty_state(tokens.size(0))
        pos = torch.arange(state["seen"], state["seen"] + t, device=tokens.device)
        x = self.embed(tokens)
        new = {"seen": state["seen"] + t, "memory": [], "last": []}
        for layer, memory, last in zip(self.layers, state["memory"], state["last"]):
            if self.use_checkpoint and self.training:
                x, memory, last = checkpoint(layer, x, pos, memory, last, use_reentrant=False)
            else:
                x, memory, last = layer(x, pos, memory, last)
            new["memory"].append(memory)
            new["last"].append(last)
        logits = self.head(self.ln_f(x))
        out = {"logits": logits, "state": new}
        if labels is not None:
            scored = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            target = labels[:, 1:].reshape(-1)
            nll = F.cross_entropy(scored.flatten(0, 1), target, ignore_index=-100, reduction="none")
            out["loss"] = nll.sum() / (target >= 0).sum().clamp(min=1)
        return out

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, min_p=0.0, num_return_sequences=1, eos_token_id=None, seed=None):
        """The prompts, each num_return_sequences times, with max_new_tokens more. Behind eos_token_id it repeats itself."""
        mode = self.training
        self.train(False)
        n = num_return_sequences
        g = torch.Generator(tokens.device)
        if seed is None:
            g.seed()
        else:
            g.manual_seed(seed)
        out = self(tokens)
        logits = out["logits"][:, -1].repeat_interleave(n, dim=0)
        state = self.select_rows(out["state"], torch.arange(tokens.size(0), device=tokens.device).repeat_interleave(n))
        tokens = tokens.repeat_interleave(n, dim=0)
        over = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        for step in range(max_new_tokens):
            if temperature == 0:
                nxt = logits.argmax(-1)
            else:
                probs = F.softmax(logits.double() / temperature, dim=-1)
                probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
                nxt = torch.multinomial(probs, 1, generator=g).squeeze(-1)
            if eos_token_id is not None:
                nxt = torch.where(over, torch.full_like(nxt, eos_token_id), nxt)
                over |= nxt == eos_token_id
            tokens = torch.cat((tokens, nxt[:, None]), dim=1)
            if step + 1 < max_new_tokens:
                out = self(nxt[:, None], state=state)
                logits, state = out["logits"][:, -1], out["state"]
        self.train(mode)
        return tokens

    @staticmethod
    def select_rows(state, rows):
        """The state of these rows, as a beam search wants them."""
        return {
            "seen": state["seen"],
            "memory": [m.index_select(0, rows) for m in state["memory"]],
            "last": [m.index_select(0, rows) for m in state["last"]],
        }
