"""GPT as in the lecture: one module a head, no cache, learned positions. python lecture_heads.py trains it on a text file."""

import torch
import torch.nn as nn
from torch.nn import functional as F


class Head(nn.Module):
    """one head of self-attention"""

    def __init__(self, n_embd, head_size, block_size, dropout):
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size, dtype=torch.bool)), persistent=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None):
        B, T, C = x.shape
        k = self.key(x)
        q = self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, T, hs) @ (B, hs, T) -> (B, T, T)
        visible = self.tril[:T, :T]
        v = self.value(x)
        if keep is not None:
            visible = visible & keep[:, None, :]
            v = v.masked_fill(~keep[:, :, None], 0.0)
        wei = wei.masked_fill(~visible, torch.finfo(wei.dtype).min)
        wei = F.softmax(wei, dim=-1)
        wei = self.dropout(wei)
        return wei @ v


class MultiHeadAttention(nn.Module):
    """several heads side by side"""

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        head_size = n_embd // n_head
        self.heads = nn.ModuleList([Head(n_embd, head_size, block_size, dropout) for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None):
        out = torch.cat([h(x, keep) for h in self.heads], dim=-1)
        return self.dropout(self.proj(out))


class FeedFoward(nn.Module):
    def __init__(self, n_embd, dropout):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        return self.net(x)


class LayerNorm1d(nn.Module):
    """written out, as in makemore part 3, but along the channels"""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        xf = x.to(torch.promote_types(x.dtype, torch.float32))
        xmean = xf.mean(-1, keepdim=True)
        xvar = xf.var(-1, keepdim=True, unbiased=False)
        xhat = (xf - xmean) / torch.sqrt(xvar + self.eps)
        return self.gamma * xhat.to(x.dtype) + self.beta


class Block(nn.Module):
    """communication, then computation"""

    def __init__(self, n_embd, n_head, block_size, dropout):
        super().__init__()
        self.sa = MultiHeadAttention(n_embd, n_head, block_size, dropout)
        self.ffwd = FeedFoward(n_embd, dropout)
        self.ln1 = LayerNorm1d(n_embd)
        self.ln2 = LayerNorm1d(n_embd)

    def forward(self, x, keep=None):
        x = x + self.sa(self.ln1(x), keep)
        x = x + self.ffwd(self.ln2(x))
        return x


class GPTLanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_embd, n_head = config.hidden_size, config.num_heads
        self.block_size = config.max_seq_len
        self.vocab_size = config.vocab_size
        self.n_layer = config.num_layers
        self.token_embedding_table = nn.Embedding(config.vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(self.block_size, n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(n_embd, n_head, self.block_size, config.dropout) for _ in range(self.n_layer)])
        self.ln_f = LayerNorm1d(n_embd)
        self.lm_head = nn.Linear(n_embd, config.vocab_size)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith(("sa.proj.weight", "net.2.weight")):
                nn.init.normal_(p, mean=0.0, std=0.02 / (2 * self.n_layer) ** 0.5)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.token_embedding_table.weight

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None, attention_mask=None):
        """idx (B, T) -> logits (B, T, vocab), loss. targets[:, t] is what comes after idx[:, t], -1 where nothing counts.
        attention_mask (B, T): 1 at characters, 0 at padding, on the left or on the right.
        """
        B, T = idx.shape
        if T > self.block_size:
            raise ValueError(f"{T} characters, block_size is {self.block_size}")
        keep = None
        pos = torch.arange(T, device=idx.device)
        if attention_mask is not None:
            keep = attention_mask.bool()
            pos = (keep.long().cumsum(1) - 1).clamp(min=0)
        x = self.drop(self.token_embedding_table(idx) + self.position_embedding_table(pos))
        for block in self.blocks:
            x = block(x, keep)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        counted = targets != -1
        logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        nll = -torch.gather(logp, 2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)
        loss = torch.where(counted, nll, 0.0).sum() / counted.sum().clamp(min=1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, num_samples=1, repetition_penalty=1.0):
        """(B, T) -> (B * num_samples, T + max_new_tokens), the samples of a row one after the other"""
        was_training = self.training
        self.eval()
        idx = idx.repeat_interleave(num_samples, dim=0)
        for _ in range(max_new_tokens):
            idx_cond = idx[:, -self.block_size :]  # crop to the last block_size characters
            logits, _ = self(idx_cond)
            logits = logits[:, -1, :]  # (B, C)
            if repetition_penalty != 1.0:
                seen = torch.gather(logits, 1, idx)
                seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
                logits = logits.scatter(1, idx, seen)
            if temperature == 0.0:
                idx_next = torch.argmax(logits, dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    v, _ = torch.topk(logits, min(top_k, self.vocab_size))
                    logits = logits.masked_fill(logits < v[:, [-1]], float("-inf"))
                probs = F.softmax(logits, dim=-1)
                idx_next = torch.multinomial(probs, num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        self.train(was_training)
        return idx

    def configure_optimizers(self, weight_decay=0.1, learning_rate=1e-3):
        decay, no_decay = [], []
        for p in self.parameters():
            (decay if p.dim() >= 2 else no_decay).append(p)
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99))


@torch.no_grad()
def estimate_loss(model, batches):
    was_training = model.training
    model.eval()
    losses = torch.tensor([model(x, y)[1].item() for x, y in batches])
    model.train(was_training)
    return losses.mean()


def save_checkpoint(model, path):
    torch.save(model.state_dict(), path)


def load_checkpoint(model, path):
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model
