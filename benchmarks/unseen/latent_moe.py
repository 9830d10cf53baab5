"""Latent attention and a mixture of experts, after DeepSeek-V2."""
from dataclasses import dataclass

import torch
from torch import nn
import torch.nn.functional as F


@dataclass
class Args:
    vocab_size: int = 1024
    dim: int = 64
    n_layers: int = 3
    n_heads: int = 4
    inter_dim: int = 128
    moe_inter_dim: int = 32
    n_dense_layers: int = 1
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    n_activated_experts: int = 2
    route_scale: float = 1.0
    kv_lora_rank: int = 12
    qk_nope_head_dim: int = 8
    qk_rope_head_dim: int = 4
    v_head_dim: int = 6
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_seq_len: int = 256
    aux_alpha: float = 0.001


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rope(x, pos, theta):
    """x: (B, T, H, R), pos: (T,). The two halves of R are the two coordinates."""
    half = x.shape[-1] // 2
    freq = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = pos.to(torch.float64)[:, None] * freq
    cos, sin = angle.cos().to(x.dtype)[:, None, :], angle.sin().to(x.dtype)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class MLA(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.n_heads = args.n_heads
        self.rank, self.nope = args.kv_lora_rank, args.qk_nope_head_dim
        self.rope_dim, self.v_dim = args.qk_rope_head_dim, args.v_head_dim
        self.theta = args.rope_theta
        self.wq = nn.Linear(args.dim, self.n_heads * (self.nope + self.rope_dim), bias=False)
        self.wkv_a = nn.Linear(args.dim, self.rank + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(self.rank, args.norm_eps)
        self.wkv_b = nn.Linear(self.rank, self.n_heads * (self.nope + self.v_dim), bias=False)
        self.wo = nn.Linear(self.n_heads * self.v_dim, args.dim, bias=False)
        self.scale = (self.nope + self.rope_dim) ** -0.5

    def forward(self, x, start, past):
        B, T, _ = x.shape
        pos = torch.arange(start, start + T, device=x.device)
        q = self.wq(x).view(B, T, self.n_heads, self.nope + self.rope_dim)
        q_nope, q_pe = q.split([self.nope, self.rope_dim], dim=-1)
        q_pe = rope(q_pe, pos, self.theta)

        latent, k_pe = self.wkv_a(x).split([self.rank, self.rope_dim], dim=-1)
        k_pe = rope(k_pe.unsqueeze(2), pos, self.theta).squeeze(2)
        new = torch.cat([self.kv_norm(latent), k_pe], dim=-1)
        cache = new if past is None else torch.cat([past, new], dim=1)
        latent, k_pe = cache.split([self.rank, self.rope_dim], dim=-1)
        S = cache.shape[1]

        if T == 1 and past is not None:
            # decoding: never expand the latent, move wkv_b to the query and to the output
            w = self.wkv_b.weight.view(self.n_heads, self.nope + self.v_dim, self.rank)
            w_k, w_v = w[:, : self.nope], w[:, self.nope :]
            q_lat = torch.einsum("bthn,hnr->bthr", q_nope, w_k)
            scores = torch.einsum("bthr,bsr->bhts", q_lat, latent) + torch.einsum("bthr,bsr->bhts", q_pe, k_pe)
            probs = (scores * self.scale).softmax(dim=-1)
            out = torch.einsum("bhts,bsr->bthr", probs, latent)
            out = torch.einsum("bthr,hvr->bthv", out, w_v)
        else:
            kv = self.wkv_b(latent).view(B, S, self.n_heads, self.nope + self.v_dim)
            k_nope, v = kv.split([self.nope, self.v_dim], dim=-1)
            scores = torch.einsum("bthn,bshn->bhts", q_nope, k_nope) + torch.einsum("bthr,bsr->bhts", q_pe, k_pe)
            future = torch.arange(S, device=x.device)[None, :] > pos[:, None]
            probs = (scores * self.scale).masked_fill(future, float("-inf")).softmax(dim=-1)
            out = torch.einsum("bhts,bshv->bthv", probs, v)
        return self.wo(out.reshape(B, T, self.n_heads * self.v_dim)), cache


class MLP(nn.Module):
    def __init__(self, dim, inter):
        super().__init__()
        self.w1 = nn.Linear(dim, inter, bias=False)
        self.w2 = nn.Linear(inter, dim, bias=False)
        self.w3 = nn.Linear(dim, inter, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.topk, self.n_experts, self.route_scale = args.n_activated_experts, args.n_routed_experts, args.route_scale
        self.gate = nn.Linear(args.dim, args.n_routed_experts, bias=False)
        self.experts = nn.ModuleList([MLP(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts)])
        self.shared = MLP(args.dim, args.n_shared_experts * args.moe_inter_dim)

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        probs = self.gate(x).softmax(dim=-1)
        weights, chosen = probs.topk(self.topk, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True) * self.route_scale
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == i)
            if token.numel():
                y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        y = y + self.shared(x)
        # share of the tokens times share of the probability, as in Switch
        load = F.one_hot(chosen, self.n_experts).sum(dim=1).to(probs.dtype).mean(dim=0) / self.topk
        balance = self.n_experts * (load * probs.mean(dim=0)).sum()
        return y.view(shape), balance


class Block(nn.Module):
    def __init__(self, i, args: Args):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = MLA(args)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.is_moe = i >= args.n_dense_layers
        self.ffn = MoE(args) if self.is_moe else MLP(args.dim, args.inter_dim)

    def forward(self, x, start, past):
        h, cache = self.attn(self.attn_norm(x), start, past)
        x = x + h
        h = self.ffn(self.ffn_norm(x))
        h, balance = h if self.is_moe else (h, None)
        return x + h, cache, balance


class LatentMoE(nn.Module):
    def __init__(self, args: Args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = nn.ModuleList([Block(i, args) for i in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = nn.Linear(args.dim, args.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02
                if name.endswith(("wo.weight", "w2.weight")):
                    std /= (2 * args.n_layers) ** 0.5
                nn.init.normal_(p, std=std)

    def forward(self, tokens, cache=None, use_cache=False, labels=None):
        """cache: a list with one (B, S, rank + rope) tensor a layer."""
        start = 0 if cache is None else cache[0].shape[1]
        if start + tokens.shape[1] > self.args.max_seq_len:
            raise ValueError("sequence too long")
        h = self.embed(tokens)
        new_cache, balances = [], []
        for i, block in enumerate(self.blocks):
            h, layer_cache, balance = block(h, start, None if cache is None else cache[i])
            new_cache.append(layer_cache)
            if balance is not None:
                balances.append(balance)
        logits = self.head(self.norm(h))
        out = {"logits": logits}
        if use_cache:
            out["cache"] = new_cache
        if labels is not None:
            out["loss"] = self.loss(logits, labels)
            out["aux_loss"] = self.args.aux_alpha * sum(balances) if balances else logits.new_zeros(())
        return out

    def loss(self, logits, labels):
        """-log p of every label that is not negative, averaged. Labels are the tokens themselves, shifted here."""
        logits, labels = logits[:, :-1], labels[:, 1:]
        keep = labels >= 0
        picked = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nll = logits.logsumexp(dim=-1) - picked
        return (nll * keep).sum() / keep.sum().clamp(min=1)

    @torch.inference_mode()
    def generate(self, tokens, max_new_tokens, temperature=0.0, top_p=1.0, seed=None):
        if tokens.shape[1] + max_new_tokens > self.args.max_seq_len:
            raise ValueError("prompt and new tokens do not fit into max_seq_len")
        rng = None
        if seed is not None:
            rng = torch.Generator(device=tokens.device).manual_seed(seed)
        training = self.training
        self.eval()
        try:
            cache, inp = None, tokens
            for _ in range(max_new_tokens):
                out = self(inp, cache, use_cache=True)
                cache, logits = out["cache"], out["logits"][:, -1]
                inp = self.pick(logits, temperature, top_p, rng)
                tokens = torch.cat([tokens, inp], dim=1)
        finally:
            self.train(training)
        return tokens

    @staticmethod
    def pick(logits, temperature, top_p, rng):
        if temperature <= 0:
            return logits.argmax(dim=-1, keepdim=True)
        probs = (logits / temperature).softmax(dim=-1)
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        before = sorted_probs.cumsum(dim=-1) - sorted_probs
        sorted_probs = sorted_probs.masked_fill(before >= top_p, 0.0)
        drawn = torch.multinomial(sorted_probs, 1, generator=rng)
        return order.gather(-1, drawn)
