# DIYModel after steps 1 to 5 of my todo list: embed -> ModelBlock x N -> RMSNorm, lm_head on top, KV cache, checkpoints.
import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

FIELDS = [
    "vocab_size", "num_layers", "hidden_size", "num_heads", "max_seq_len", "dropout", "rms_norm_eps", "rope_theta",
    "tie_word_embeddings",
]  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x):
        h = x if x.dtype == torch.float64 else x.float()  # squares are too large for half
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def apply_rope(x, positions, theta):
    """x: (batch, heads, seq, head_dim), positions: (batch, seq)"""
    half = x.shape[-1] // 2
    inv_freq = theta ** (-torch.arange(half, device=x.device).double() / half)
    angle = positions[:, None, :, None] * inv_freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.theta = config.rope_theta
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, key_positions, past=None):
        batch, seq, hidden = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = q.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, seq, self.num_heads, self.head_dim).transpose(1, 2)
        q = apply_rope(q, positions, self.theta)
        k = apply_rope(k, positions, self.theta)
        if past is not None:
            k = torch.cat([past["k"], k], dim=2)
            v = torch.cat([past["v"], v], dim=2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        # a key at position -1 is padding
        mask = (key_positions[:, None, :] <= positions[:, :, None]) & (key_positions[:, None, :] >= 0)
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        weights = self.dropout(F.softmax(scores, dim=-1))
        y = (weights @ v).transpose(1, 2).reshape(batch, seq, hidden)
        return self.out(y), {"k": k, "v": v, "pos": key_positions}


class ModelBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, 4 * config.hidden_size),
            nn.SiLU(),
            nn.Linear(4 * config.hidden_size, config.hidden_size),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, positions, key_positions, past=None):
        y, present = self.attn(self.norm1(x), positions, key_positions, past)
        x = x + self.dropout(y)
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x, present


class DIYModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([ModelBlock(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, seq_lengths=None, past_key_values=None, use_cache=False):
        """hidden_states, or (hidden_states, presents). seq_lengths: how many of these input_ids are real, in each row."""
        batch, seq = input_ids.shape
        if self.training and (use_cache or past_key_values is not None):
            raise ValueError("no cache in training, call model.eval() first")
        cached_pos = 0 if past_key_values is None else past_key_values[0][1]  # int, or one a row
        start = torch.as_tensor(cached_pos, device=input_ids.device).expand(batch)
        longest = seq + (cached_pos if isinstance(cached_pos, int) else int(cached_pos.max()))
        if longest > self.config.max_seq_len:
            raise ValueError(f"{longest} tokens, but max_seq_len is {self.config.max_seq_len}")
        steps = torch.arange(seq, device=input_ids.device)
        positions = start[:, None] + steps
        key_positions = positions
        if seq_lengths is not None:
            key_positions = positions.masked_fill(steps >= seq_lengths[:, None], -1)
        if past_key_values is not None:
            key_positions = torch.cat([past_key_values[0][0]["pos"], key_positions], dim=1)
        new_pos = cached_pos + (seq if seq_lengths is None else seq_lengths)

        hidden_states = self.dropout(self.embed_tokens(input_ids))
        presents = []
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i][0]
            hidden_states, present = layer(hidden_states, positions, key_positions, past)
            presents.append((present, new_pos))
        hidden_states = self.norm(hidden_states)
        return (hidden_states, presents) if use_cache else hidden_states


class DIYForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = DIYModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, attention_mask=None, seq_lengths=None, past_key_values=None, use_cache=False):
        """logits, or (logits, presents). attention_mask has the shape of input_ids, 1 at real tokens, 0 after them."""
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape or (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
                raise ValueError("attention_mask must look like input_ids, with padding on the right")
            seq_lengths = attention_mask.long().sum(dim=1)
        out = self.model(input_ids, seq_lengths, past_key_values, use_cache)
        if use_cache:
            hidden_states, presents = out
            return self.lm_head(hidden_states), presents
        return self.lm_head(out)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, attention_mask=None, temperature=0.0, use_cache=True):
        """The new tokens, (batch, max_new_tokens). Temperature 0 is greedy."""
        was_training = self.training
        self.eval()
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        last = attention_mask.long().sum(dim=1) - 1
        ids, mask, past, new_tokens = input_ids, attention_mask, None, []
        for _ in range(max_new_tokens):
            if use_cache:
                logits, past = self(ids, attention_mask=mask, past_key_values=past, use_cache=True)
            else:
                logits = self(ids, attention_mask=mask)
            logits = logits[rows, last]
            if temperature == 0:
                token = logits.argmax(dim=-1)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1).squeeze(1)
            new_tokens.append(token)
            if use_cache:
                ids, mask, last = token[:, None], torch.ones_like(token[:, None]), torch.zeros_like(last)
            else:  # write it after the last real token of its row
                last = last + 1
                ids = F.pad(ids, (0, 1)).scatter(1, last[:, None], token[:, None])
                mask = F.pad(mask, (0, 1)).scatter(1, last[:, None], 1)
        self.train(was_training)
        return torch.stack(new_tokens, dim=1)


def save(model, path):
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps it
    config = {name: getattr(model.config, name) for name in FIELDS}
    torch.save({"config": config, "state_dict": model.state_dict()}, path)


def load(path):
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model = DIYForCausalLM(SimpleNamespace(**checkpoint["config"]))
    model.load_state_dict(checkpoint["state_dict"])
    return model
