"""Healthy models that compute or move otherwise on one of two paths, and what must still be found in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from tests.test_healthy_strangers import passes

DECODE = "decode.cached_equals_full", "decode.chunks", "decode.session", "decode.long_row"

Layer = tuple[Tensor, Tensor]  # keys and values, (B, H, S, D)


def only_failure(module: Any, check: str) -> str:
    """What a check says of a module that fails it."""
    (failed,) = check_causal_lm(module, only=[check], profile="quick").failed
    assert failed.failure is not None
    return failed.failure.message


class Attending(nn.Module):
    """Learned positions, and a cache of a pair a layer that is handed back with the weights of attention before it."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.embed, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(config.num_layers))
        self.out = nn.ModuleList(nn.Linear(d, d) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, config.vocab_size)

    def weights(self, scores: Tensor, past: int) -> Tensor:
        """Attention's, of masked scores."""
        return scores.softmax(-1)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        T = input_ids.shape[1]
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        x = self.embed(input_ids) + self.positions(torch.arange(past, past + T))
        hidden = ~torch.ones(T, past + T, dtype=torch.bool).tril(past)
        presents: list[Layer] = []
        attentions = []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            if past_key_values:
                k, v = torch.cat((past_key_values[i][0], k), 2), torch.cat((past_key_values[i][1], v), 2)
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
            attentions.append(self.weights(scores, past).to(v))
            presents.append((k, v))
            x = x + out((attentions[-1] @ v).transpose(1, 2).flatten(2))
        return self.head(self.norm(x)), attentions, presents if use_cache else None


def test_the_cache_is_found_behind_a_list_of_attention_weights() -> None:
    passes(Attending, "causality.through_cache", *DECODE, "modes.call_leaves_mode", seeds=1)


class Float32OnTheCache(Attending):
    """As copies of MiniMind: attention's own kernel without a cache, a softmax in float32 on one."""

    def weights(self, scores: Tensor, past: int) -> Tensor:
        return scores.float().softmax(-1) if past else scores.softmax(-1)


class AndWrong(Float32OnTheCache):
    def weights(self, scores: Tensor, past: int) -> Tensor:
        return super().weights(scores * (1 + 1e-5) if past else scores, past)


def test_float32_on_the_cached_path_alone_is_rounding() -> None:
    passes(Float32OnTheCache, *DECODE)


def test_what_float32_does_not_explain_is_found_beside_it() -> None:
    (check,) = select_checks(["decode.cached_equals_full"])
    assert verify_one(resolve(AndWrong), check, Settings(10, shrink=False)).status == "failed"


class NarrowMask(nn.Module):
    """Its mask is float32, as ``torch.full(…, -inf).triu(1)`` makes it, whatever the rest is."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.embed, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.qkv, self.head = nn.Linear(d, 3 * d), nn.Linear(d, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Any:
        T = input_ids.shape[1]
        x = self.embed(input_ids) + self.positions(torch.arange(T))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = torch.full((T, T), -torch.inf).triu(1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def test_a_float32_mask_beside_float64_is_read_as_its_author_means_it() -> None:
    before = F.scaled_dot_product_attention
    passes(NarrowMask, "causality.long_row", "numerics.bfloat16_near_float64", seeds=1)
    assert F.scaled_dot_product_attention is before


class MovedTogether(nn.Module):
    """Two tables that move as soon as the first of them is found elsewhere."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        angles = torch.outer(torch.arange(config.max_seq_len).double(), 0.5 ** torch.arange(d).double())
        self.cos, self.sin = angles.cos(), angles.sin()

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.cos.device != x.device or self.cos.dtype != x.dtype:
            self.cos, self.sin = self.cos.to(x), self.sin.to(x)
        return self.cos, self.sin

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        cos, sin = (table[: x.shape[1]] for table in self.tables(x))
        return self.head((x * cos + x.flip(-1) * sin).cumsum(1))


class MovedByHalf(MovedTogether):
    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.cos = self.cos.to(x)
        return self.cos, self.sin.to(x.dtype)


def test_tables_that_move_together_do_not_stay_behind() -> None:
    passes(MovedTogether, "state.moves")
    assert "saw the call break on sin, left behind" in only_failure(MovedByHalf, "state.moves")


class Ahead(nn.Module):
    """A head for the token after next learns from the total, which comes first beside the main loss."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.ahead = nn.Linear(d, d)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(idx).cumsum(1)
        logits = self.head(x)
        if targets is None:
            return logits, None, None
        main = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, main + self.term(x, targets), main

    def term(self, x: Tensor, targets: Tensor) -> Tensor:
        further = self.head(self.ahead(x[:, :-1]))
        return 0.3 * F.cross_entropy(further.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1)


class NeverLearns(Ahead):
    def term(self, x: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            return super().term(x, targets)


def test_a_head_that_only_another_of_the_losses_reaches_learns() -> None:
    passes(Ahead, "gradients.reach_every_parameter")
    assert "saw none at ahead.bias, ahead.weight" in only_failure(NeverLearns, "gradients.reach_every_parameter")


class Reads(nn.Module):
    """It has no use for some of the fields, and saves none of those."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Any:
        return self.head(self.drop(self.embed(input_ids)).cumsum(1))


def saving(*fields: str) -> Subject:
    """A subject whose checkpoints hold these fields of its configuration."""

    def save(module: nn.Module, path: Any) -> None:
        config = {name: getattr(module.config, name) for name in fields}
        torch.save({"config": config, "state_dict": module.state_dict()}, path)

    def load(path: Any) -> nn.Module:
        saved = torch.load(path, weights_only=True)
        module = Reads(SimpleNamespace(**{"dropout": 0.0} | saved["config"]))
        module.load_state_dict(saved["state_dict"])
        return module

    return Subject(Reads, save=save, load=load)


def test_a_field_that_the_model_never_reads_need_not_be_saved() -> None:
    passes(saving("vocab_size", "hidden_size", "dropout"), "checkpoint.round_trip")
    assert "must have dropout=" in only_failure(saving("vocab_size", "hidden_size"), "checkpoint.round_trip")


class Eager(NarrowMask):
    """A config's name chooses between two implementations of attention."""

    wrong = 1.0

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, input_ids: Tensor) -> Any:
        if self.config._attn_implementation == "sdpa":
            return super().forward(input_ids)
        T = input_ids.shape[1]
        x = self.embed(input_ids) + self.positions(torch.arange(T))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = self.wrong * q @ k.mT / q.shape[-1] ** 0.5
        weights = (scores + torch.full((T, T), -torch.inf).triu(1)).softmax(-1)
        return self.head(x + (weights @ v).transpose(1, 2).flatten(2))


class Scaled(Eager):
    wrong = 0.5


def test_implementations_that_a_name_in_the_config_chooses_are_compared() -> None:
    passes(Eager, "causality.each_backend")
    assert "attn_implementation='sdpa'" in only_failure(Scaled, "causality.each_backend")


class Growing:
    """A cache that forward makes, and adds to."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]


class OnAnObject(nn.Module):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def lacks(self, cache: Growing | None) -> bool:
        return cache is None

    def forward(self, input_ids: Tensor, past_key_values: Growing | None = None, use_cache: bool = False) -> Any:
        T = input_ids.shape[1]
        if use_cache:
            cache = Growing() if self.lacks(past_key_values) else past_key_values
            assert cache is not None
            cache.ids = input_ids if cache.ids is None else torch.cat((cache.ids, input_ids), 1)
            return self.head(self.embed(cache.ids).cumsum(1)[:, -T:]), cache
        return self.head(self.embed(input_ids).cumsum(1))


class TakesEmptyForNone(OnAnObject):
    def lacks(self, cache: Growing | None) -> bool:
        return not cache


def test_an_empty_cache_of_forwards_own_class_is_filled() -> None:
    passes(OnAnObject, "decode.caller_object")
    assert "the cache object that was passed in" in only_failure(TakesEmptyForNone, "decode.caller_object")


class RoomFor32(nn.Module):
    """As Meta's Llama, whose cache has a place for each of 32 rows, and which is asked for ``max_gen_len`` tokens."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_buffer("room", torch.zeros(32, 1), persistent=False)

    def forward(self, tokens: Tensor) -> Any:
        self.room[: len(tokens)] = tokens[:, :1]
        return self.head(self.embed(tokens).cumsum(1))

    def generate(self, prompt_tokens: Tensor, max_gen_len: int, temperature: float = 0.0) -> Tensor:
        tokens = prompt_tokens
        for _ in range(max_gen_len):
            logits = self(tokens)[:, -1]
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                new = torch.multinomial((logits.double() / temperature).softmax(-1), 1)
            tokens = torch.cat((tokens, new), 1)
        return tokens


SAMPLING = "generation.follows_distribution", "generation.rows_draw_independently", "generation.temperature_zero"


def test_what_takes_few_rows_at_once_is_judged_in_several_calls() -> None:
    passes(RoomFor32, *SAMPLING, seeds=1)
