"""With what people write beside a model: saving it with its configuration, and opening what was saved."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SavedBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.heads = config.hidden_size, config.num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        S = k.shape[2]
        mask = torch.arange(S, device=x.device) <= torch.arange(S - T, S, device=x.device)[:, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, d))
        return x + self.down(F.gelu(self.up(self.norm_2(x)))), (k, v)


class Saved(nn.Module):
    """(input_ids, past, use_cache) -> logits or (logits, past); learned positions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = nn.ModuleList(SavedBlock(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, past: Any = None, use_cache: bool = False) -> Any:
        start = past[0][0].shape[2] if past is not None else 0
        x = self.embed(input_ids) + self.positions(
            torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        )
        present = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, past[i] if past is not None else None)
            present.append(kv)
        logits = self.head(x)
        return (logits, tuple(present)) if use_cache else logits


FIELDS = ("vocab_size", "max_seq_len", "num_layers", "hidden_size", "num_heads", "intermediate_size")


def save(model: Saved) -> dict[str, bytes]:
    """The files by name; a tied head is the embedding, and not saved twice."""
    fields = {name: getattr(model.config, name) for name in (*FIELDS, "tie_word_embeddings")}
    weights, file = dict(model.state_dict()), io.BytesIO()
    if model.config.tie_word_embeddings:
        del weights["head.weight"]
    torch.save(weights, file)
    return {"config.json": json.dumps(fields).encode(), "weights.pt": file.getvalue()}


def open_saved(files: dict[str, bytes]) -> tuple[Saved, Any, list[str]]:
    """The model, its configuration, and what does not fit."""
    config = SimpleNamespace(**{"num_layers": 1, "tie_word_embeddings": False, **json.loads(files["config.json"])})
    model = Saved(config)
    found = model.load_state_dict(torch.load(io.BytesIO(files["weights.pt"]), weights_only=True), strict=False)
    tied = ["head.weight"] if config.tie_word_embeddings else []
    missing = [f"{name} missing" for name in found.missing_keys if name not in tied]
    return model.eval(), config, [*missing, *(f"{name} left over" for name in found.unexpected_keys)]


def example() -> tuple[Saved, Any, list[str]]:
    """A tied model of two layers, saved and opened."""
    sizes = dict(zip(FIELDS, (12, 8, 2, 8, 2, 8), strict=True))
    torch.manual_seed(0)
    return open_saved(save(Saved(SimpleNamespace(**sizes, tie_word_embeddings=True))))
