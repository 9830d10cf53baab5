# A small GPT for training: (idx, targets) -> (logits, loss), no cache. Vocabulary rounded up to a multiple of 8,
# normalised queries and keys, a soft cap on the logits, AdamW groups, a checkpoint that carries its settings.
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class Settings:
    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    softcap: float = 30.0
    eps: float = 1e-6


class Norm(nn.Module):
    """RMS norm with a gain."""

    def __init__(self, n, eps):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        dt = torch.promote_types(x.dtype, torch.float32)
        y = x.to(dt)
        return (y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x.dtype) * self.gain


class Mixer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s, self.d = s, s.n_embd // s.n_head
        self.to_q = nn.Linear(s.n_embd, s.n_embd)
        self.to_k = nn.Linear(s.n_embd, s.n_embd)
        self.to_v = nn.Linear(s.n_embd, s.n_embd)
        self.out = nn.Linear(s.n_embd, s.n_embd)
        self.q_norm, self.k_norm = Norm(self.d, s.eps), Norm(self.d, s.eps)
        self.flash = True

    def heads(self, x):
        return x.unflatten(-1, (self.s.n_head, self.d)).movedim(2, 1)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.flash and not (self.training and self.s.dropout > 0):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.d)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            att = att.masked_fill(future, -torch.inf)
            att = F.dropout(att.softmax(-1), self.s.dropout, self.training)
            y = torch.einsum("bhij,bhjd->bhid", att, v)
        return self.out(y.movedim(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.norm1, self.mixer = Norm(s.n_embd, s.eps), Mixer(s)
        self.norm2 = Norm(s.n_embd, s.eps)
        self.up, self.down = nn.Linear(s.n_embd, 4 * s.n_embd), nn.Linear(4 * s.n_embd, s.n_embd)
        self.drop = nn.Dropout(s.dropout)

    def forward(self, x):
        x = x + self.drop(self.mixer(self.norm1(x)))
        return x + self.drop(self.down(F.relu(self.up(self.norm2(x))).square()))


class Nano(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.s = s
        self.padded_vocab = 8 * math.ceil(s.vocab_size / 8)
        self.tok = nn.Embedding(self.padded_vocab, s.n_embd)
        self.pos = nn.Parameter(torch.randn(s.block_size, s.n_embd) * 0.02)
        self.drop = nn.Dropout(s.dropout)
        self.layers = nn.ModuleList([Layer(s) for _ in range(s.n_layer)])
        self.norm = Norm(s.n_embd, s.eps)
        self.head = nn.Linear(s.n_embd, self.padded_vocab)
        self.remat = False
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                m.weight.data.normal_(0, 0.02)
            if isinstance(m, nn.Linear):
                m.bias.data.zero_()

    def gradient_checkpointing_enable(self):
        self.remat = True

    def hidden(self, idx):
        B, T = idx.shape
        assert T <= self.s.block_size, f"{T} tokens are more than block_size={self.s.block_size}"
        x = self.drop(self.tok(idx) + self.pos[:T])
        for layer in self.layers:
            if self.remat and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.norm(x)

    def logits(self, h):
        z = self.head(h)[..., : self.s.vocab_size]
        return self.s.softcap * torch.tanh(z / self.s.softcap)

    def forward(self, idx, targets=None):
        h = self.hidden(idx)
        if targets is None:
            logits = self.logits(h[:, -1:])
            return logits, None
        logits = self.logits(h)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def configure_optimizers(self, weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95)):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        mode = self.training
        self.eval()
        for _ in range(max_new_tokens):
            window = idx if idx.shape[1] <= self.s.block_size else idx[:, -self.s.block_size :]
            logits = self(window)[0][:, -1]
            if temperature == 0.0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    best, _ = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
                    logits[logits < best[:, [-1]]] = -torch.inf
                new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
        self.train(mode)
        return idx


def build(config):
    return Nano(
        Settings(
            vocab_size=config.vocab_size,
            block_size=config.max_seq_len,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_embd=config.hidden_size,
            dropout=config.dropout,
            eps=config.rms_norm_eps,
        )
    )


def save(model, path):
    weights = {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}
    weights = {name.removeprefix("module."): t for name, t in weights.items()}
    settings = getattr(model, "module", model).s
    torch.save({"settings": asdict(settings), "weights": weights}, path)


def load(path):
    content = torch.load(path, map_location="cpu", weights_only=True)
    model = Nano(Settings(**content["settings"]))
    model.load_state_dict(content["weights"])
    return model
