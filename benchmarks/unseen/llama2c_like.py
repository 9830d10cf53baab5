"""Llama for inference and for training, in the manner of llama2.c and gpt-fast: the KV cache is a buffer."""

import inspect
import math
from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelArgs:
    dim: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: Optional[int] = None
    vocab_size: int = 512
    hidden_dim: Optional[int] = None
    multiple_of: int = 8
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seq_len: int = 256
    dropout: float = 0.0


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self._norm(x.float()).type_as(x) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float):
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(freqs), freqs)  # complex64


def apply_rotary_emb(x, freqs_cis):
    x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x_ * freqs_cis[None, :, None, :]).flatten(3).type_as(x)


class KVCache(nn.Module):
    def __init__(self, max_batch_size, max_seq_len, n_kv_heads, head_dim, dtype, device):
        super().__init__()
        shape = (max_batch_size, n_kv_heads, max_seq_len, head_dim)
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def update(self, start_pos, k, v):
        B, _, T, _ = k.shape
        self.k[:B, :, start_pos : start_pos + T] = k.detach()
        self.v[:B, :, start_pos : start_pos + T] = v.detach()
        return self.k[:B, :, : start_pos + T], self.v[:B, :, : start_pos + T]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_heads = args.n_heads
        self.n_kv_heads = args.n_heads if args.n_kv_heads is None else args.n_kv_heads
        assert self.n_heads % self.n_kv_heads == 0
        self.n_rep = self.n_heads // self.n_kv_heads
        self.head_dim = args.dim // args.n_heads
        self.kv_dim = self.n_kv_heads * self.head_dim
        self.wqkv = nn.Linear(args.dim, args.dim + 2 * self.kv_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.dropout = args.dropout
        self.resid_dropout = nn.Dropout(args.dropout)
        self.kv_cache = None
        self._register_load_state_dict_pre_hook(self._load_hook)

    def _load_hook(self, state_dict, prefix, *args):
        # checkpoints of Meta have wq, wk and wv
        if prefix + "wq.weight" in state_dict:
            parts = [state_dict.pop(f"{prefix}{name}.weight") for name in ("wq", "wk", "wv")]
            state_dict[prefix + "wqkv.weight"] = torch.cat(parts)

    def forward(self, x, freqs_cis, start_pos):
        B, T, D = x.shape
        q, k, v = self.wqkv(x).split([self.n_heads * self.head_dim, self.kv_dim, self.kv_dim], dim=-1)
        q = apply_rotary_emb(q.view(B, T, self.n_heads, self.head_dim), freqs_cis)
        k = apply_rotary_emb(k.view(B, T, self.n_kv_heads, self.head_dim), freqs_cis)
        v = v.view(B, T, self.n_kv_heads, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        mask = None
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(start_pos, k, v)
            if T > 1 and start_pos > 0:
                q_pos = torch.arange(start_pos, start_pos + T, device=x.device)
                mask = torch.arange(start_pos + T, device=x.device)[None, :] <= q_pos[:, None]
        k = k.repeat_interleave(self.n_rep, dim=1)
        v = v.repeat_interleave(self.n_rep, dim=1)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1 and mask is None,
        )
        return self.resid_dropout(self.wo(y.transpose(1, 2).reshape(B, T, D)))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        hidden_dim = args.hidden_dim
        if hidden_dim is None:
            hidden_dim = int(2 * 4 * args.dim / 3)
            hidden_dim = args.multiple_of * ((hidden_dim + args.multiple_of - 1) // args.multiple_of)
        self.w1 = nn.Linear(args.dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, freqs_cis, start_pos):
        h = x + self.attention(self.attention_norm(x), freqs_cis, start_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList([TransformerBlock(args) for _ in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith(("w2.weight", "wo.weight")):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * args.n_layers))
        self._make_freqs()

    def _make_freqs(self):
        args = self.args
        freqs_cis = precompute_freqs_cis(args.dim // args.n_heads, args.max_seq_len, args.rope_theta)
        self.register_buffer("freqs_cis", freqs_cis.to(self.tok_embeddings.weight.device), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._make_freqs()  # a complex table does not survive .to(torch.bfloat16)
        return self

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def setup_caches(self, max_batch_size, max_seq_len=None):
        max_seq_len = self.args.max_seq_len if max_seq_len is None else max_seq_len
        w = self.output.weight
        for layer in self.layers:
            a = layer.attention
            a.kv_cache = KVCache(max_batch_size, max_seq_len, a.n_kv_heads, a.head_dim, w.dtype, w.device)

    def remove_caches(self):
        for layer in self.layers:
            layer.attention.kv_cache = None

    def forward(self, tokens, start_pos: int = 0, targets=None):
        """With caches, tokens stand at start_pos and after; without, start_pos is 0. Targets are the tokens after."""
        B, T = tokens.shape
        if start_pos + T > self.args.max_seq_len:
            raise ValueError(f"max_seq_len is {self.args.max_seq_len}")
        h = self.dropout(self.tok_embeddings(tokens))
        freqs_cis = self.freqs_cis[start_pos : start_pos + T]
        for layer in self.layers:
            h = layer(h, freqs_cis, start_pos)
        logits = self.output(self.norm(h))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters and device_type == "cuda"
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, **({"fused": True} if fused else {}))


def logits_to_probs(logits, temperature, top_k):
    logits = logits / temperature
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)), dim=-1)
        logits = torch.where(logits < v[:, -1:], -float("inf"), logits)
    return F.softmax(logits, dim=-1)


def sample(logits, temperature, top_k, generator):
    if temperature == 0.0:
        return torch.argmax(logits[:, -1], dim=-1, keepdim=True)
    probs = logits_to_probs(logits[:, -1], temperature, top_k)
    return torch.multinomial(probs, num_samples=1, generator=generator)


@torch.no_grad()
def generate(model: Transformer, prompt, max_new_tokens: int, temperature=1.0, top_k=None, seed=None):
    """prompt (B, T) -> (B, T + max_new_tokens)"""
    B, T = prompt.shape
    total = T + max_new_tokens
    if total > model.args.max_seq_len:
        raise ValueError(f"{total} tokens do not fit into {model.args.max_seq_len}")
    generator = torch.Generator(device=prompt.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    was_training = model.training
    model.eval()
    model.setup_caches(B, total)
    seq = torch.empty(B, total, dtype=prompt.dtype, device=prompt.device)
    seq[:, :T] = prompt
    cur, pos = prompt, 0
    for i in range(T, total):
        logits, _ = model(cur, pos)
        pos += cur.size(1)
        cur = sample(logits, temperature, top_k, generator)
        seq[:, i : i + 1] = cur
    model.remove_caches()
    model.train(was_training)
    return seq
