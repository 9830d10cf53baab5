"""As in transformers: gradient checkpointing, a cache unless told otherwise, a vocabulary that grows; one file holds
settings and weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Settings:
    vocab_size: int = 100
    num_layers: int = 2
    hidden_size: int = 16
    num_heads: int = 2
    intermediate_size: int = 32
    max_seq_len: int = 32
    dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


class Cache:
    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


def turn(x: Tensor, position: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    turns = torch.polar(torch.ones_like(angle), angle)
    wide = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat((wide.real, wide.imag), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, config: Settings, index: int) -> None:
        super().__init__()
        d, inner, self.index, self.config = config.hidden_size, config.intermediate_size, index, config
        self.norm_1, self.norm_2 = (nn.LayerNorm(d, config.rms_norm_eps) for _ in range(2))
        self.qkv, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc, self.mlp_c_proj = nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor, position: Tensor, cache: Cache | None) -> Tensor:
        B, T, d = x.shape
        p = self.config.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.config.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turn(q, position, self.config.rope_theta), turn(k, position, self.config.rope_theta)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        allowed = torch.arange(k.shape[2], device=x.device) <= position[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, d))
        return x + F.dropout(self.mlp_c_proj(F.gelu(self.fc(self.norm_2(x)))), p)


class Pretrained(nn.Module):
    """(input_ids, past_key_values, use_cache) -> {"logits", "past_key_values"}."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config = Settings(**{field.name: getattr(config, field.name) for field in fields(Settings)})
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / (2 * config.num_layers) ** (0.5 * ("c_proj" in name)))
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def gradient_checkpointing_enable(self) -> None:
        self.gradient_checkpointing = True

    @torch.no_grad()
    def resize_token_embeddings(self, size: int) -> None:
        kept = min(size, self.config.vocab_size)
        embed, head = self.embed.weight, self.head.weight
        self.embed = nn.Embedding(size, self.config.hidden_size).to(embed)
        self.head = nn.Linear(self.config.hidden_size, size, bias=False).to(head)
        self.embed.weight[:kept] = embed[:kept]
        self.head.weight[:kept] = head[:kept]
        self.tie_weights()
        self.config.vocab_size = size

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> dict[str, Any]:
        recompute = self.gradient_checkpointing and self.training
        use_cache = use_cache and not recompute
        cache = past_key_values if past_key_values is not None else Cache() if use_cache else None
        start, T = cache.layers[0][0].shape[2] if cache is not None and cache.layers else 0, input_ids.shape[1]
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} positions are more than {self.config.max_seq_len}")
        x, position = self.embed(input_ids), torch.arange(start, start + T, device=input_ids.device)
        for layer in self.layers:
            x = checkpoint(layer, x, position, cache, use_reentrant=True) if recompute else layer(x, position, cache)
        return {"logits": self.head(self.norm(x)), "past_key_values": cache}


def save(model: Any, path: Path) -> None:
    model = getattr(model, "_orig_mod", getattr(model, "module", model))  # torch.compile's and DataParallel's wrappers
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, path)


def load(path: Path) -> Pretrained:
    content = torch.load(path, map_location="cpu", weights_only=True)
    model = Pretrained(Settings(**content["config"]))
    model.to(content["model"]["embed.weight"].dtype).load_state_dict(content["model"])
    return model.eval()
