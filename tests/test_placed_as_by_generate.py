"""Positions on a cache: given where the module's own generate gives them, and no default of its forward is right."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from tests.test_conventions import Past

CACHED = "decode.cached_equals_full"


class Restarting(Past):
    """Without position_ids, its positions count from 0, on a cache too."""

    def forward(
        self, token_ids: Tensor, position_ids: Tensor | None = None, kv_cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        T = token_ids.shape[1]
        places = torch.arange(T)[None] if position_ids is None else position_ids
        x = self.embed(token_ids) + self.positions(places)
        q, *new = self.qkv(x).chunk(3, -1)
        k, v = present = torch.stack(new) if kv_cache is None else torch.cat((kv_cache, torch.stack(new)), 2)
        scores = (q @ k.transpose(1, 2)).masked_fill(~self.seen(T, k.shape[1]), -torch.inf)
        return self.head(x + scores.softmax(-1) @ v), present


class Placing(Restarting):
    """Its generate says where each new token stands."""

    says_where = True

    @torch.no_grad()
    def generate(self, token_ids: Tensor, max_new_tokens: int) -> Tensor:
        logits, cache = self(token_ids)
        for _ in range(max_new_tokens):
            new = logits[:, -1:].argmax(-1)
            token_ids = torch.cat((token_ids, new), 1)
            place = torch.full_like(new, token_ids.shape[1] - 1) if self.says_where else None
            logits, cache = self(new, place, cache)
        return token_ids


class Forgetting(Placing):
    """Its generate leaves them out."""

    says_where = False


class PlacingWrongly(Placing):
    """Its mask is that of ``is_causal=True``, which one query on a cache passes for the first key."""

    def seen(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).tril()


def test_positions_are_given_on_a_cache_as_the_modules_own_generate_gives_them() -> None:
    found = Subject(Placing)
    assert found.describe().endswith("the cache is a value, beside which position_ids says where new tokens stand")
    assert check_causal_lm(found, profile="quick", only=["decode.c*", "generation.*greedy*"]).verdict == "passed"


@pytest.mark.parametrize("module", [Restarting, Forgetting, PlacingWrongly])
def test_a_default_that_restarts_or_a_wrong_step_is_no_convention(module: type[nn.Module]) -> None:
    assert "where new tokens stand" not in Subject(module).describe()
    assert check_causal_lm(module, profile="quick", only=[CACHED]).verdict == "failed"


PARTS = """
import torch
from torch import nn

class KVCache:
    def __init__(self, max_batch_size, max_seq_len, n_heads, head_dim, dtype=torch.float32):
        self.kept = torch.zeros(2, max_batch_size, max_seq_len, n_heads * head_dim, dtype=dtype)

    def update(self, start, new):
        self.kept[:, : new.shape[1], start : start + new.shape[2]] = new
        return self.kept[:, : new.shape[1], : start + new.shape[2]]

class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x, start, cache):
        q, *new = self.qkv(x).chunk(3, -1)
        k, v = torch.stack(new) if cache is None else cache.update(start, torch.stack(new))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return (q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1) @ v
"""


class FromElsewhere(nn.Module):
    """Its attention, and the class of caches that it wants, stand in a file of another folder."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        elsewhere = types.ModuleType("elsewhere")
        exec(PARTS, vars(elsewhere))
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = nn.ModuleList(elsewhere.Attention(config.hidden_size) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens: Tensor, start_pos: int = 0, kv_caches: list[Any] | None = None) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(start_pos, start_pos + tokens.shape[1]))
        for number, layer in enumerate(self.layers):
            x = x + layer(x, start_pos, kv_caches[number] if kv_caches else None)
        logits: Tensor = self.head(x)
        return logits


def test_a_class_of_caches_is_found_beside_the_parts_of_the_module() -> None:
    assert check_causal_lm(FromElsewhere, profile="quick", only=["decode.c*"]).verdict == "passed"
