"""Llama as Meta wrote it, from memory: rotary positions in pairs, grouped queries, SwiGLU, a buffer as the cache."""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100


@dataclass
class ModelOutput:
    logits: torch.Tensor
    loss: Optional[torch.Tensor] = None


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = wide(x)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.to(x.dtype) * self.weight


def rotary_tables(head_dim: int, length: int, theta: float):
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), inv_freq)
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class KVCache:
    """Room for max_len tokens of every layer; what is beyond start_pos is never read."""

    def __init__(self, n_layers: int, shape: tuple, dtype: torch.dtype, device: torch.device):
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor):
        end = start + k.shape[2]
        self.k[layer][:, :, start:end] = k
        self.v[layer][:, :, start:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class Attention(nn.Module):
    def __init__(self, cfg, layer: int):
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv = cfg.num_heads, cfg.num_kv_heads
        self.head_dim = cfg.hidden_size // cfg.num_heads
        self.wq = nn.Linear(cfg.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(cfg.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.wv = nn.Linear(cfg.hidden_size, self.n_kv * self.head_dim, bias=False)
        self.wo = nn.Linear(self.n_heads * self.head_dim, cfg.hidden_size, bias=False)

    def forward(self, x, cos, sin, start_pos, cache, visible, keep):
        bsz, seqlen, _ = x.shape
        q = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(bsz, seqlen, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(bsz, seqlen, self.n_kv, self.head_dim).transpose(1, 2)
        q = apply_rotary(q, cos, sin)
        k = apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, start_pos, k, v)
        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0.0)
        k = k.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        scores = wide(q) @ wide(k).transpose(-2, -1) * self.head_dim**-0.5
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        probs = scores.softmax(dim=-1).to(v.dtype)
        y = (probs @ v).transpose(1, 2).contiguous().view(bsz, seqlen, -1)
        return self.wo(y)


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.w1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.w2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.w3 = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, cfg, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = Attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.feed_forward = FeedForward(cfg)

    def forward(self, x, cos, sin, start_pos, cache, visible, keep):
        h = x + self.attention(self.attention_norm(x), cos, sin, start_pos, cache, visible, keep)
        return h + self.feed_forward(self.ffn_norm(h))


class Llama(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.gradient_checkpointing = False
        self.tok_embeddings = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(TransformerBlock(cfg, i) for i in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.output = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        cos, sin = rotary_tables(cfg.hidden_size // cfg.num_heads, cfg.max_seq_len, cfg.rope_theta)
        self.register_buffer("rope_cos", cos)
        self.register_buffer("rope_sin", sin)
        if cfg.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def gradient_checkpointing_enable(self):
        self.gradient_checkpointing = True

    def make_cache(self, batch_size: int) -> KVCache:
        cfg, w = self.cfg, self.output.weight
        shape = (batch_size, cfg.num_kv_heads, cfg.max_seq_len, cfg.hidden_size // cfg.num_heads)
        return KVCache(cfg.num_layers, shape, w.dtype, w.device)

    def forward(self, tokens, start_pos: int = 0, cache=None, attention_mask=None, labels=None) -> ModelOutput:
        bsz, seqlen = tokens.shape
        end = start_pos + seqlen
        if end > self.cfg.max_seq_len:
            raise ValueError(f"{end} tokens, but max_seq_len is {self.cfg.max_seq_len}")
        positions = torch.arange(start_pos, end, device=tokens.device)[None]
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start_pos:]
        cos, sin = self.rope_cos[positions].unsqueeze(1), self.rope_sin[positions].unsqueeze(1)
        query_at = torch.arange(start_pos, end, device=tokens.device)
        key_at = torch.arange(end, device=tokens.device)
        visible = (key_at <= query_at[:, None])[None, None]
        keep = None
        if attention_mask is not None:
            keep = attention_mask.bool()
            visible = visible & keep[:, None, None, :]

        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and cache is None:
                h = checkpoint(layer, h, cos, sin, start_pos, None, visible, keep, use_reentrant=False)
            else:
                h = layer(h, cos, sin, start_pos, cache, visible, keep)
        logits = self.output(self.norm(h))
        loss = self.loss(logits, labels) if labels is not None else None
        return ModelOutput(logits=logits, loss=loss)

    def loss(self, logits, labels):
        logits, targets = wide(logits)[:, :-1], labels[:, 1:]
        counted = targets != IGNORE
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return nll / counted.sum().clamp(min=1)

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, eos_id=None, seed=None):
        if tokens.shape[1] + max_new_tokens > self.cfg.max_seq_len:
            raise ValueError("prompt and new tokens do not fit into max_seq_len")
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            generator = None
            if seed is not None:
                generator = torch.Generator(device=tokens.device).manual_seed(seed)
            cache, pos, out = self.make_cache(tokens.shape[0]), 0, tokens
            finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            for _ in range(max_new_tokens):
                logits = self(out[:, pos:], start_pos=pos, cache=cache).logits[:, -1]
                pos = out.shape[1]
                nxt = sample(logits, temperature, top_k, top_p, generator)
                if eos_id is not None:
                    nxt = torch.where(finished, eos_id, nxt)
                    finished |= nxt == eos_id
                out = torch.cat([out, nxt.unsqueeze(1)], dim=1)
                if finished.all():
                    break
            return out
        finally:
            for m, mode in modes:
                m.training = mode


def sample(logits, temperature, top_k, top_p, generator):
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = wide(logits) / temperature
    if top_k > 0:
        kth = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1).values[:, -1, None]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = torch.softmax(logits, dim=-1)
    if top_p < 1.0:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        before = sorted_probs.cumsum(dim=-1) - sorted_probs
        sorted_probs = sorted_probs.masked_fill(before >= top_p, 0.0)
        choice = torch.multinomial(sorted_probs / sorted_probs.sum(-1, keepdim=True), 1, generator=generator)
        return order.gather(-1, choice).squeeze(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)
