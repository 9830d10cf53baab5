# GPT from scratch, chapter 4 plus a KV cache that lives in the attention modules.
# model(idx) is a plain forward; model(idx, use_cache=True) continues what model.reset_kv_cache() began.
import torch
import torch.nn as nn


class MultiHeadAttention(nn.Module):
    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        assert d_out % num_heads == 0, "d_out must be divisible by num_heads"
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.triu(torch.ones(context_length, context_length, dtype=torch.bool), diagonal=1))
        self.cache_k, self.cache_v = None, None
        self.ptr_current_pos = 0

    def forward(self, x, use_cache=False):
        b, num_tokens, d_in = x.shape

        keys_new = self.W_key(x).view(b, num_tokens, self.num_heads, self.head_dim)
        values_new = self.W_value(x).view(b, num_tokens, self.num_heads, self.head_dim)
        queries = self.W_query(x).view(b, num_tokens, self.num_heads, self.head_dim)

        if use_cache:
            if self.cache_k is None:
                self.cache_k, self.cache_v = keys_new, values_new
            else:
                self.cache_k = torch.cat([self.cache_k, keys_new], dim=1)
                self.cache_v = torch.cat([self.cache_v, values_new], dim=1)
            keys, values = self.cache_k, self.cache_v
            q_start = self.ptr_current_pos
            self.ptr_current_pos += num_tokens
        else:
            keys, values = keys_new, values_new
            q_start = 0

        keys = keys.transpose(1, 2)
        queries = queries.transpose(1, 2)
        values = values.transpose(1, 2)

        attn_scores = queries @ keys.transpose(2, 3)
        mask_bool = self.mask[q_start : q_start + num_tokens, : keys.shape[-2]]
        attn_scores = attn_scores.masked_fill(mask_bool, -torch.inf)

        attn_weights = torch.softmax(attn_scores / keys.shape[-1] ** 0.5, dim=-1)
        attn_weights = self.dropout(attn_weights)
        context_vec = (attn_weights @ values).transpose(1, 2)
        context_vec = context_vec.contiguous().view(b, num_tokens, self.d_out)
        return self.out_proj(context_vec)

    def reset_cache(self):
        self.cache_k, self.cache_v = None, None
        self.ptr_current_pos = 0


class LayerNorm(nn.Module):
    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        h = x if x.dtype == torch.float64 else x.float()
        mean = h.mean(dim=-1, keepdim=True)
        var = h.var(dim=-1, keepdim=True, unbiased=False)
        norm_x = (h - mean) / torch.sqrt(var + self.eps)
        return self.scale * norm_x.to(x.dtype) + self.shift


class GELU(nn.Module):
    def forward(self, x):
        inner = torch.sqrt(torch.tensor(2.0 / torch.pi, dtype=x.dtype, device=x.device)) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


class TransformerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            num_heads=cfg["n_heads"],
            dropout=cfg["drop_rate"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x, use_cache=False):
        shortcut = x
        x = self.norm1(x)
        x = self.att(x, use_cache=use_cache)
        x = self.drop_shortcut(x)
        x = x + shortcut

        shortcut = x
        x = self.norm2(x)
        x = self.ff(x)
        x = self.drop_shortcut(x)
        x = x + shortcut
        return x


class GPTModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.ModuleList([TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.current_pos = 0
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, in_idx, use_cache=False):
        batch_size, seq_len = in_idx.shape
        start = self.current_pos if use_cache else 0
        if start + seq_len > self.cfg["context_length"]:
            raise ValueError(f"position {start + seq_len} is beyond the context of {self.cfg['context_length']}")
        pos_ids = torch.arange(start, start + seq_len, device=in_idx.device)
        if use_cache:
            self.current_pos += seq_len
        x = self.tok_emb(in_idx) + self.pos_emb(pos_ids).unsqueeze(0)
        x = self.drop_emb(x)
        for blk in self.trf_blocks:
            x = blk(x, use_cache=use_cache)
        x = self.final_norm(x)
        return self.out_head(x)

    def reset_kv_cache(self):
        for blk in self.trf_blocks:
            blk.att.reset_cache()
        self.current_pos = 0


@torch.no_grad()
def generate(model, idx, max_new_tokens, context_size=None, temperature=0.0, top_k=None, eos_id=None, use_cache=True):
    """idx and up to max_new_tokens more. With a cache all of it must fit; without, the last context_size tokens are seen.
    A row that has met eos_id goes on with eos_id; temperature 0 is greedy."""
    was_training = model.training
    model.eval()
    ctx_len = context_size or model.cfg["context_length"]
    if use_cache and idx.shape[1] + max_new_tokens > ctx_len:
        raise ValueError("prompt and new tokens do not fit into the context")
    finished = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
    model.reset_kv_cache()
    for step in range(max_new_tokens):
        if use_cache:
            logits = model(idx if step == 0 else idx[:, -1:], use_cache=True)
        else:
            logits = model(idx[:, -ctx_len:])
        logits = logits[:, -1, :]
        if top_k is not None:
            top_logits, _ = torch.topk(logits, min(top_k, logits.shape[-1]))
            min_val = top_logits[:, -1:]
            logits = torch.where(logits < min_val, torch.tensor(-torch.inf, dtype=logits.dtype), logits)
        if temperature > 0.0:
            probs = torch.softmax(logits / temperature, dim=-1)
            idx_next = torch.multinomial(probs, num_samples=1)
        else:
            idx_next = torch.argmax(logits, dim=-1, keepdim=True)
        if eos_id is not None:
            idx_next[finished] = eos_id
            finished = finished | (idx_next[:, 0] == eos_id)
        idx = torch.cat((idx, idx_next), dim=1)
        if finished.all():
            break
    model.reset_kv_cache()
    model.train(was_training)
    return idx


def build(config):
    return GPTModel(
        {
            "vocab_size": config.vocab_size,
            "context_length": config.max_seq_len,
            "emb_dim": config.hidden_size,
            "n_heads": config.num_heads,
            "n_layers": config.num_layers,
            "drop_rate": config.dropout,
            "qkv_bias": False,
        }
    )
