"""Modules that write every call to a cache of their own, as Meta's Llama does, and can be trained all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import verdicts

GRADIENTS = ("gradients.*", "causality.gradient", "loss.gradient", "training.small_step_lowers_loss")


class WritesToItsOwnCache(nn.Module):
    """(tokens, start_pos, targets) -> logits, loss; what is cached goes without its graph."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, d)
        self.query, self.key_value = nn.Linear(d, d), nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, config.vocab_size)
        self.register_buffer("cache", torch.zeros(4, config.max_seq_len, 2 * d), persistent=False)

    def forward(
        self, tokens: Tensor, start_pos: int = 0, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        T = tokens.shape[1]
        x = self.embed(tokens)
        k, v = self.cached(self.key_value(x), start_pos).chunk(2, -1)
        places = torch.arange(start_pos + T, device=tokens.device)
        ages = places[start_pos:, None] - places
        scores = (self.query(x) @ k.transpose(1, 2) - ages).masked_fill(ages < 0, -torch.inf)
        logits = self.head(x + scores.softmax(-1) @ v)
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def cached(self, kv: Tensor, start: int) -> Tensor:
        B, T, _ = kv.shape
        before = self.cache[:B, :start].clone()
        self.cache[:B, start : start + T] = kv.detach()
        return torch.cat((before, kv), 1)


class AttendsToWhatLostItsGraph(WritesToItsOwnCache):
    """In eval mode, which caches: training takes keys and values as they are."""

    def cached(self, kv: Tensor, start: int) -> Tensor:
        super().cached(kv, start)
        return kv if self.training else self.cache[: len(kv), : start + kv.shape[1]].clone()


class KeepsTheGraph(WritesToItsOwnCache):
    """Which the next call writes over."""

    def cached(self, kv: Tensor, start: int) -> Tensor:
        B, T, _ = kv.shape
        self.cache[:B, start : start + T] = kv
        return self.cache[:B, : start + T]


class ReachesNoKeys(WritesToItsOwnCache):
    def cached(self, kv: Tensor, start: int) -> Tensor:
        return super().cached(kv.detach(), start)


def test_who_can_be_trained_is_checked_for_it() -> None:
    found = Subject(WritesToItsOwnCache).convention
    assert (found.cache_on_module, found.always_cached, found.trains_on_cache) == (True, True, True)
    statuses = verdicts(WritesToItsOwnCache, (*GRADIENTS, "decode.*", "state.*"))
    assert set(statuses.values()) == {"passed", "skipped"}, statuses
    assert {statuses[id] for id in ("gradients.reach_every_parameter", *GRADIENTS[1:])} == {"passed"}


@pytest.mark.parametrize("module", [AttendsToWhatLostItsGraph, KeepsTheGraph])
def test_who_cannot_in_eval_mode_is_for_inference(module: type[nn.Module]) -> None:
    found = Subject(module).convention
    assert not found.trains_on_cache
    assert found.missing["graph"] == "every call is on the cache that the module keeps: it is for inference only"
    statuses = verdicts(module, (*GRADIENTS, "decode.*", "state.*"))
    assert set(statuses.values()) == {"passed", "skipped"}, statuses


def test_what_its_gradients_miss_is_seen() -> None:
    report = check_causal_lm(ReachesNoKeys, profile="quick", only=("gradients.reach_every_parameter",))
    assert [result.status for result in report.results] == ["failed"], report.to_text()
