"""Caches that a module's own ``generate`` begins, and feeds one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import verdicts
from tests.test_conventions import Past

STEPS = ("decode.cached_equals_full", "decode.session", "decode.branch", "decode.rows_reordered")


class FedByGenerate(Past):
    """Without a cache it takes whole sequences; on one, as its generate makes it, a token, from the first on."""

    def forward(self, input_ids: Tensor, cache: list[dict[str, Any]] | None = None) -> Any:
        if cache is None:
            return self.step(input_ids, None)[0]
        assert input_ids.shape[1] == 1
        logits, kept, _ = self.step(input_ids, self.before(cache[0]["kv"]))
        return logits, [{"kv": kept}]

    def before(self, kept: Tensor | None) -> Tensor | None:
        return kept

    def generate(self, input_ids: Tensor, max_length: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        cache: list[dict[str, Any]] = [{"kv": None}]
        for place in range(input_ids.shape[1] + max_length - 1):
            logits, cache = self(input_ids[:, place : place + 1], cache=cache)
            if place + 1 < input_ids.shape[1]:
                continue
            logits = logits[:, -1] / temperature
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
            input_ids = torch.cat((input_ids, torch.multinomial(logits.softmax(-1), 1)), 1)
        return input_ids


class ForgetsTheFirst(FedByGenerate):
    def before(self, kept: Tensor | None) -> Tensor | None:
        return kept if kept is None or kept.shape[2] < 2 else kept[:, :, 1:]


class FailsOnTheSecond(FedByGenerate):
    """A cache that holds something has another shape than it is used by."""

    def before(self, kept: Tensor | None) -> Tensor | None:
        return None if kept is None else kept.flatten(1)


def test_a_cache_of_generate_is_fed_one_token_at_a_time() -> None:
    subject = Subject(FedByGenerate)
    assert subject.convention.one_at_a_time
    assert subject.missing("chunks") == "a call on the cache takes one token at a time"
    assert verdicts(subject, STEPS) == dict.fromkeys(STEPS, "passed")


def test_what_is_wrong_on_such_a_cache_is_seen() -> None:
    report = check_causal_lm(ForgetsTheFirst, profile="quick", only=STEPS[:1])
    assert [result.status for result in report.results] == ["failed"]


def test_a_second_token_that_fails_by_mistake_is_no_lack_of_a_cache() -> None:
    report = check_causal_lm(FailsOnTheSecond, profile="quick", only=[*STEPS[:1], "generation.greedy_is_argmax"])
    assert [result.status for result in report.results] == ["failed", "failed"], report.to_text()
    assert all(result.failure and "the subject raised" in result.failure.message for result in report.failed)
