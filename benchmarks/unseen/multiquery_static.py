"""A code model in the manner of StarCoder: many query heads, one head of keys and values, learned positions.

Decoding uses a static cache inside the module: setup_cache(batch, length), then model(ids, input_pos=...) with the slots that
the ids take, and reset_cache() at the end. Without input_pos nothing is cached and nothing is read from a cache.
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class CodeConfig:
    n_vocab: int
    n_ctx: int = 128
    n_embd: int = 64
    n_head: int = 4
    n_layer: int = 2
    n_inner: int = 256
    dropout: float = 0.0
    pad_vocab_to: int = 8  # tensor cores like it
    layer_norm_eps: float = 1e-5

    @property
    def n_padded(self) -> int:
        return math.ceil(self.n_vocab / self.pad_vocab_to) * self.pad_vocab_to


class FusedCrossEntropy(torch.autograd.Function):
    """Summed cross entropy that keeps one matrix, the gradient. Rows whose target is negative count nothing."""

    @staticmethod
    def forward(ctx, logits, target):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = wide - wide.logsumexp(dim=-1, keepdim=True)
        index = target.clamp(min=0)[:, None]
        counted = (target >= 0)[:, None]
        nll = -logp.gather(1, index) * counted
        grad = logp.exp()
        grad.scatter_add_(1, index, -torch.ones_like(nll))
        ctx.save_for_backward((grad * counted).to(logits.dtype))
        return nll.sum()

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None


class MultiQueryAttention(nn.Module):
    def __init__(self, cfg: CodeConfig):
        super().__init__()
        self.n_head, self.d = cfg.n_head, cfg.n_embd // cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, cfg.n_embd + 2 * self.d)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)
        self.attn_dropout = cfg.dropout
        self.resid_dropout = nn.Dropout(cfg.dropout)
        self.cache_k = self.cache_v = None

    def setup_cache(self, batch: int, length: int):
        w = self.c_attn.weight
        self.cache_k = torch.zeros(batch, length, self.d, dtype=w.dtype, device=w.device)
        self.cache_v = torch.zeros_like(self.cache_k)

    def forward(self, x, mask, input_pos):
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split([c, self.d, self.d], dim=-1)
        if input_pos is not None:
            end = mask.size(-1)
            self.cache_k[:b, input_pos] = k.detach()
            self.cache_v[:b, input_pos] = v.detach()
            k, v = self.cache_k[:b, :end], self.cache_v[:b, :end]
        q = q.view(b, t, self.n_head, self.d).transpose(1, 2)
        k = k[:, None].expand(b, self.n_head, -1, self.d)
        v = v[:, None].expand(b, self.n_head, -1, self.d)
        p = self.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = y.transpose(1, 2).reshape(b, t, c)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, cfg: CodeConfig):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, cfg.n_inner)
        self.c_proj = nn.Linear(cfg.n_inner, cfg.n_embd)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, cfg: CodeConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, eps=cfg.layer_norm_eps)
        self.attn = MultiQueryAttention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, mask, input_pos):
        x = x + self.attn(self.ln_1(x), mask, input_pos)
        return x + self.mlp(self.ln_2(x))


class CodeLM(nn.Module):
    def __init__(self, cfg: CodeConfig):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg.n_padded, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.n_ctx, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layer)])
        self.ln_f = nn.LayerNorm(cfg.n_embd, eps=cfg.layer_norm_eps)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.n_padded, bias=False)
        self.lm_head.weight = self.wte.weight  # tied, always
        for module in self.modules():
            self._init_weights(module)

    def _init_weights(self, module):
        std = 0.02
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (MultiQueryAttention, MLP)):  # the last matrices before the residual stream
            nn.init.normal_(module.c_proj.weight, std=std / math.sqrt(2 * self.cfg.n_layer))
            module.c_proj._scaled = True

    def setup_cache(self, batch: int, length: int | None = None):
        for block in self.h:
            block.attn.setup_cache(batch, self.cfg.n_ctx if length is None else length)

    def reset_cache(self):
        for block in self.h:
            block.attn.cache_k = block.attn.cache_v = None

    def reorder_cache(self, rows):
        """Row i of the cache becomes what rows[i] was."""
        for block in self.h:
            block.attn.cache_k = block.attn.cache_k[rows]
            block.attn.cache_v = block.attn.cache_v[rows]

    def forward(self, input_ids, input_pos=None, attention_mask=None, targets=None):
        """Logits over the real vocabulary; with targets (the tokens after, -100 for none) the mean loss as well.

        input_pos: (T,) the slots of the cache, rising by one. attention_mask: (B, cached + T), 0 at padding on the left.
        """
        b, t = input_ids.shape
        slots = torch.arange(t, device=input_ids.device) if input_pos is None else input_pos
        end = int(slots[-1]) + 1
        if end > self.cfg.n_ctx:
            raise ValueError(f"{end} tokens, the model has {self.cfg.n_ctx} positions")
        mask = torch.arange(end, device=input_ids.device) <= slots[:, None]  # (T, end)
        positions = slots
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -t:]
            mask = mask & attention_mask.bool()[:, None, None, :]
            mask = mask | torch.eye(end, dtype=torch.bool, device=mask.device)[slots]
        x = self.drop(self.wte(input_ids) + self.wpe(positions))
        for block in self.h:
            x = block(x, mask, input_pos)
        logits = self.lm_head(self.ln_f(x))[..., : self.cfg.n_vocab]
        if targets is None:
            return logits
        flat = targets.reshape(-1)
        loss = FusedCrossEntropy.apply(logits.reshape(-1, logits.size(-1)), flat) / (flat >= 0).sum().clamp(min=1)
        return logits, loss

    @torch.inference_mode()
    def generate(self, input_ids, max_new_tokens, attention_mask=None, temperature=0.8, top_p=None, stop_token=None, seed=None):
        """(B, T + max_new_tokens); the new tokens of a row after its stop_token are stop_token."""
        b, t = input_ids.shape
        if t + max_new_tokens > self.cfg.n_ctx:
            raise ValueError(f"{t} + {max_new_tokens} tokens do not fit into {self.cfg.n_ctx}")
        was_training = self.training
        self.eval()
        rng = torch.Generator(device=input_ids.device)
        rng.manual_seed(seed) if seed is not None else rng.seed()
        self.setup_cache(b, t + max_new_tokens)
        out = input_ids.new_zeros(b, t + max_new_tokens)
        out[:, :t] = input_ids
        keep = torch.ones_like(out)
        if attention_mask is not None:
            keep[:, :t] = attention_mask
        alive = torch.ones(b, dtype=torch.bool, device=out.device)
        lo = 0
        for hi in range(t, t + max_new_tokens):
            slots = torch.arange(lo, hi, device=out.device)
            step = self(out[:, lo:hi], input_pos=slots, attention_mask=keep[:, :hi])[:, -1]
            token = self._draw(step, temperature, top_p, rng)
            if stop_token is not None:
                token = torch.where(alive, token, stop_token)
                alive = alive & (token != stop_token)
            out[:, hi] = token
            lo = hi
        self.reset_cache()
        self.train(was_training)
        return out

    @staticmethod
    def _draw(logits, temperature, top_p, rng):
        if temperature == 0:
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits.double() / temperature, dim=-1)
        if top_p is not None:
            ranked, order = probs.sort(dim=-1, descending=True)
            before = ranked.cumsum(dim=-1) - ranked
            ranked = ranked.masked_fill((before >= top_p) & (before > 0), 0.0)
            probs = torch.zeros_like(probs).scatter_(1, order, ranked)
        return torch.multinomial(probs, 1, generator=rng)[:, 0]

    def optimizer(self, lr=6e-4, weight_decay=0.1):
        named = dict(self.named_parameters())
        matrices = [p for n, p in named.items() if n.endswith("weight") and p.dim() == 2]
        rest = [p for n, p in named.items() if not (n.endswith("weight") and p.dim() == 2)]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}], lr=lr
        )


def save(model, path):
    state = {name.removeprefix("_orig_mod."): w for name, w in model.state_dict().items()}
    torch.save({"config": asdict(model.cfg), "model": state}, path)


def load(path):
    found = torch.load(path, map_location="cpu", weights_only=True)
    model = CodeLM(CodeConfig(**found["config"]))
    model.load_state_dict(found["model"])
    return model


def build(config):
    return CodeLM(
        CodeConfig(
            n_vocab=config.vocab_size,
            n_ctx=config.max_seq_len,
            n_embd=config.hidden_size,
            n_head=config.num_heads,
            n_layer=config.num_layers,
            n_inner=config.intermediate_size,
            dropout=config.dropout,
        )
    )
