"""What a ``generate`` of a stranger's own is taken to have: by its signature, with its defaults out of the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.registry import list_checks
from diymodel.verify.runner import Settings, verify_one
from tests.test_generating import LikeMiniMind, Pairs, found, subject

CHECKS = {check.id: check for check in list_checks()}


class OwnUnderTransformers(LikeMiniMind):
    """A subclass of a transformers model that has written its generate itself."""

    generation_config = SimpleNamespace(eos_token_id=None)

    def generate(  # type: ignore[override]
        self, inputs: Tensor, max_new_tokens: int = 8, temperature: float = 0.8, eos_token_id: int = 2, **further: Any
    ) -> Tensor:
        return super().generate(inputs, max_new_tokens, eos_token_id, temperature, top_p=1.0)


class HandsOn(OwnUnderTransformers):
    """Whatever it is given goes on to the generate below."""

    def generate(self, idx: Tensor, **settings: Any) -> Tensor:  # type: ignore[override]
        return super().generate(idx, **settings)


def test_the_signature_that_is_there_goes_before_transformers_hidden_names() -> None:
    own = found(OwnUnderTransformers)
    assert own.names.keys() == {"ids", "new_tokens", "temperature", "eos"}
    assert own.fixed == {"eos_token_id": -1}
    handed_on = found(HandsOn)
    assert {"ids": "idx", "new_tokens": "max_new_tokens", "do_sample": "do_sample"}.items() <= handed_on.names.items()
    for check in ("generation.keeps_prompt", "generation.eos_per_row", "generation.greedy_is_argmax"):
        assert verify_one(subject(OwnUnderTransformers), CHECKS[check], Settings(5)).status == "passed"


class FiftyTokens(Pairs):
    """Draws among fifty tokens unless it is told otherwise."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = 50) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(idx)[:, -1] / temperature
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), 1)
        return idx


class FiftyOrZero(FiftyTokens):
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 50) -> Tensor:  # type: ignore[override]
        return super().generate(idx, max_new_tokens, temperature, top_k if top_k > 0 else None)


class FiftyAtMost(FiftyTokens):
    """It cannot be switched off, and does no harm."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 50) -> Tensor:  # type: ignore[override]
        if not top_k:
            raise ValueError("top_k must be positive")
        return super().generate(idx, max_new_tokens, temperature, min(top_k, self.head.out_features))


@pytest.mark.parametrize(
    ("factory", "fixed"), [(FiftyTokens, {"top_k": None}), (FiftyOrZero, {"top_k": 0}), (FiftyAtMost, {})]
)
def test_a_default_top_k_above_the_vocabulary_keeps_no_check_from_running(factory: Any, fixed: dict[str, Any]) -> None:
    generating = found(factory)
    assert generating.fixed == fixed
    assert {"greedy", "sampling", "top_k"}.isdisjoint(generating.missing)
    assert verify_one(subject(factory), CHECKS["generation.rows_draw_independently"], Settings(5)).status == "passed"


class Punishes(Pairs):
    """Draws by default neither a token that the row has, nor an unlikely one."""

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float, repetition_penalty: float = 9.0, min_p: float = 0.2
    ) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(idx)[:, -1]
            logits = logits - (repetition_penalty - 1) * F.one_hot(idx, logits.shape[-1]).amax(1)
            probabilities = (logits / (temperature or 1e-9)).softmax(-1)
            probabilities[probabilities < min_p * probabilities.amax(-1, keepdim=True)] = 0.0
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), 1)
        return idx


def test_punishments_by_default_are_switched_off() -> None:
    assert found(Punishes).fixed == {"temperature": 1.0, "repetition_penalty": 1.0, "min_p": 0.0}
    for check in ("generation.follows_distribution", "generation.temperature_zero"):
        assert verify_one(subject(Punishes), CHECKS[check], Settings(5)).status == "passed"


class NumberOrNothing(Pairs):
    """top_k has no default, and None is no number."""

    def generate(self, x: Tensor, max_new_token: int, temperature: float, top_k: int, top_p: float) -> Tensor:
        return self.following(x, max_new_token, temperature, top_k if top_k > 0 else None, top_p)


def test_a_top_k_without_a_default_is_switched_off_by_a_number_where_none_fails() -> None:
    generating = found(NumberOrNothing)
    assert generating.names["new_tokens"] == "max_new_token"
    assert generating.fixed == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert {"greedy", "sampling", "top_k", "generate_batch"}.isdisjoint(generating.missing)


class NamedAndBroken(Pairs):
    """top_k, eos and use_cache meet code that was never run; top_p is refused on purpose."""

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_id: int | None = None,
        use_cache: bool = False,
        top_p: float | None = None,
    ) -> Tensor:
        if top_k is not None:
            top_k = min(top_k, self.vocab_size)
        if eos_id is not None:
            idx = idx[{}[eos_id]]
        if use_cache:
            idx = self.head(idx, cache)  # type: ignore[name-defined]  # noqa: F821
        if top_p is not None:
            raise NotImplementedError("no top_p yet")
        return self.following(idx, max_new_tokens, temperature)


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("generation.top_k", "AttributeError: 'NamedAndBroken' object has no attribute 'vocab_size'"),
        ("generation.eos_per_row", "KeyError: "),
        ("generation.cached_greedy_is_argmax", "NameError: name 'cache' is not defined"),
    ],
)
def test_a_setting_that_is_named_and_crashes_is_a_bug(check: str, error: str) -> None:
    result = verify_one(subject(NamedAndBroken), CHECKS[check], Settings(5))
    assert result.failure is not None, result
    assert error in result.failure.message


def test_a_setting_that_is_refused_is_skipped_with_the_reason() -> None:
    result = verify_one(subject(NamedAndBroken), CHECKS["generation.top_p"], Settings(5))
    assert result.status == "skipped"
    assert result.reason == "generate does not take top_p=1.0: NotImplementedError: no top_p yet"


class ManyEnds(Pairs):
    """Its eos is a list, which a number is not."""

    def generate(self, idx: Tensor, max_new_tokens: int, eos_token_id: list[int] | None = None) -> Tensor:
        if eos_token_id is not None:
            assert 0 in eos_token_id
        return self.following(idx, max_new_tokens)


class EndsWithText(Pairs):
    def generate(self, idx: Tensor, max_new_tokens: int, stop_token: Any = "</s>") -> Tensor:
        assert stop_token.startswith("<")
        return self.following(idx, max_new_tokens)


@pytest.mark.parametrize("factory", [ManyEnds, EndsWithText])
def test_a_value_of_another_kind_than_is_asked_for_is_no_bug_of_generate(factory: Any) -> None:
    assert "eos" in found(factory).missing
    assert "greedy" not in found(factory).missing


class CannotDraw(Pairs):
    def generate(self, idx: Tensor, max_new_tokens: int, do_sample: bool = False) -> Tensor:
        return self.following(idx, max_new_tokens, self.temperature if do_sample else 0.0)  # type: ignore[arg-type]


def test_drawing_that_crashes_is_a_bug() -> None:
    result = verify_one(subject(CannotDraw), CHECKS["generation.seed_repeats"], Settings(5))
    assert result.failure is not None, result
    assert "no attribute 'temperature'" in result.failure.message


class LeavesNone(Pairs):
    """With a top_k, the likeliest tokens are excluded with all others."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        for _ in range(max_new_tokens):
            logits = self(idx)[:, -1] / temperature
            if top_k is not None:
                logits = logits.masked_fill(logits <= logits.amax(-1, keepdim=True), -torch.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), 1)
        return idx


def test_a_top_k_that_leaves_nothing_to_draw_among_is_a_bug_and_a_temperature_of_0_is_not() -> None:
    assert "temperature_zero" in found(LeavesNone).missing
    result = verify_one(subject(LeavesNone), CHECKS["generation.top_k"], Settings(5))
    assert result.failure is not None, result
    assert "probability tensor contains" in result.failure.message
