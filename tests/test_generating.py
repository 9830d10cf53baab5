"""How ``generate`` is found and called, on small imitations of what is in the wild and on transformers itself."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify.calling.generating import CAPABILITIES, Generating
from diymodel.verify.registry import Check, list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject, resolve

CHECKS = [check for check in list_checks() if check.id.startswith("generation.")]


class Pairs(nn.Module):
    """The next token depends on the last one and on how many there are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.limit = config.max_seq_len
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.positions = nn.Embedding(config.max_seq_len, 8)
        self.head = nn.Linear(8, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1])))

    def following(
        self, ids: Tensor, count: int, temperature: float = 0.0, top_k: int | None = None, top_p: float = 1.0
    ) -> Tensor:
        for _ in range(count):
            logits = self(ids)[:, -1]
            if top_p < 1:
                top_k = 1 + int((logits.softmax(-1).sort(descending=True)[0].cumsum(-1) < top_p).sum(-1).max())
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:], -torch.inf)
            new = logits.argmax(-1) if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1)
            ids = torch.cat((ids, new.view(-1, 1)), 1)
        return ids


class Greedy(Pairs):
    """Nothing but a number of tokens."""

    def generate(self, idx: Tensor, n_tokens: int) -> Tensor:
        return self.following(idx, n_tokens)


class Sampler(Pairs):
    """Nothing but a number of tokens, and they are drawn."""

    def generate(self, idx: Tensor, steps: int) -> Tensor:
        return self.following(idx, steps, temperature=1.0)


class LikeNanoGPT(Pairs):
    """A temperature that is divided by."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        return self.following(idx, max_new_tokens, temperature or torch.nan, top_k)


class LikeMinGPT(Pairs):
    """Greedy unless it is told to sample."""

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        do_sample: bool = False,
        top_k: int | None = None,
    ) -> Tensor:
        return self.following(idx, max_new_tokens, temperature * do_sample, top_k)


class LikeMamba(Pairs):
    """The length is that of the whole, and an object holds the sequences; top_k=1 is the default."""

    def generate(self, input_ids: Tensor, max_length: int, top_k: int = 1, temperature: float = 1.0) -> Any:
        count = max_length - input_ids.shape[1]
        return SimpleNamespace(sequences=self.following(input_ids, count, temperature * (top_k > 1), top_k))


class LikeXTransformers(Pairs):
    """Only the new tokens come back; the lengths of padded prompts are a tensor."""

    def generate(
        self,
        prompts: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        prompt_lens: Tensor | None = None,
        cache_kv: bool = True,
    ) -> Tensor:
        lengths = [prompts.shape[1]] * len(prompts) if prompt_lens is None else prompt_lens.tolist()
        rows = zip(prompts, lengths, strict=True)
        new = torch.cat([self.following(row[None, :n], seq_len, temperature)[:, n:] for row, n in rows])
        if eos_token is not None:
            after = (new == eos_token).cumsum(1) - (new == eos_token).long() > 0
            new = new.masked_fill(after, 0)
        return new


class LikeMiniMind(Pairs):
    """Stops at a token of its own and narrows the draws unless it is told not to."""

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 1024,
        eos_token_id: int = 2,
        temperature: float = 0.75,
        top_p: float = 0.9,
        pad_token_id: int = 0,
    ) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            input_ids = self.following(input_ids, 1, temperature, top_p=top_p)
            input_ids[:, -1].masked_fill_(done, pad_token_id)
            done |= input_ids[:, -1] == eos_token_id
            if done.all():
                break
        return input_ids


class AllRequired(Pairs):
    """Nothing has a default."""

    def generate(
        self, context: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, use_cache: bool
    ) -> Tensor:
        return self.following(context, max_new_tokens, temperature, top_k)


class OneRow(Pairs):
    """As people write it at first: a loop for one text, which ends before the token that ends it is appended."""

    def generate(self, idx: Tensor, max_new_tokens: int, eos_id: int | None = None) -> Tensor:
        for _ in range(max_new_tokens):
            longer = self.following(idx, 1)
            if longer[:, -1].item() == eos_id:
                break
            idx = longer
        return idx


class Yields(Pairs):
    """Text, bit by bit."""

    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0) -> Iterator[str]:
        yield "token"


class YieldsAndCounts(Yields):
    """And how many there were so far, which is no token."""

    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0) -> Iterator[Any]:
        yield 0, "token"


class OfText(Pairs):
    def generate(self, prompt: str, max_tokens: int = 10) -> str:
        return prompt.upper()


class Endless(Pairs):
    def generate(self, idx: Tensor) -> Tensor:
        return idx


@functools.cache
def subject(spec: Any) -> Subject:
    return resolve(spec)


def found(spec: Any) -> Generating:
    generating = subject(spec).convention.generating
    assert generating is not None
    return generating


@pytest.mark.parametrize(
    ("factory", "greedy", "sampling", "has"),
    [
        (Greedy, {}, {}, {"greedy"}),
        (Sampler, {}, {}, {"sampling"}),
        (LikeNanoGPT, {"top_k": 1}, {"temperature": 1.0}, {"greedy", "sampling", "top_k"}),
        (
            LikeMinGPT,
            {"do_sample": False},
            {"do_sample": True, "temperature": 1.0},
            {"greedy", "sampling", "top_k", "temperature_zero"},
        ),
        (LikeMamba, {"temperature": 0.0}, {}, {"greedy", "top_k", "temperature_zero"}),
        (
            LikeXTransformers,
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"greedy", "sampling", "eos", "generate_cache", "generate_padded", "temperature_zero"},
        ),
        (
            LikeMiniMind,
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"greedy", "sampling", "eos", "top_p", "temperature_zero"},
        ),
        (
            AllRequired,
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"greedy", "sampling", "top_k", "generate_cache", "temperature_zero"},
        ),
    ],
)
def test_settings_are_found_by_name_and_by_trying(
    factory: Any, greedy: dict[str, Any], sampling: dict[str, Any], has: set[str]
) -> None:
    generating = found(factory)
    assert set(CAPABILITIES) - generating.missing.keys() == {"generate", "generate_batch"} | has
    assert generating.greedy == greedy
    assert generating.sampling == sampling


@pytest.mark.parametrize(
    ("factory", "counts_prompt", "returns_prompt"),
    [(Greedy, False, True), (LikeMamba, True, True), (LikeXTransformers, False, False)],
)
def test_the_prompt_is_counted_and_returned_as_the_module_does(
    factory: Any, counts_prompt: bool, returns_prompt: bool
) -> None:
    generating = found(factory)
    assert (generating.counts_prompt, generating.returns_prompt) == (counts_prompt, returns_prompt)


class CountsThePrompt(Pairs):
    """Returns fewer new tokens than its own parameter promises."""

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        return self.following(idx, max_new_tokens - idx.shape[1])


def test_a_number_of_new_tokens_does_not_count_the_prompt() -> None:
    assert not found(CountsThePrompt).counts_prompt
    check = next(check for check in CHECKS if check.id == "generation.keeps_prompt")
    result = verify_one(subject(CountsThePrompt), check, Settings(5))
    assert result.failure is not None, result
    assert "generated-length-wrong" in result.check.causes


def test_defaults_that_end_or_narrow_are_switched_off() -> None:
    assert found(LikeMiniMind).fixed == {"eos_token_id": -1, "top_p": 1.0}


def test_one_row_at_a_time_is_told_from_batches() -> None:
    generating = found(OneRow)
    assert generating.one_row
    assert "does not take two rows: RuntimeError" in generating.missing["generate_batch"]
    assert {"greedy", "eos"}.isdisjoint(generating.missing)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (Pairs, "generate is not a method of the module"),
        (Yields, "generate returned generator: expected token ids"),
        (YieldsAndCounts, "generate returned generator: expected token ids"),
        (OfText, "generate failed on token ids: AttributeError"),
        (Endless, "generate has no parameter for the number of new tokens: it has idx"),
    ],
)
def test_what_does_not_generate_token_ids_is_skipped_with_the_reason(factory: Any, reason: str) -> None:
    generating = found(factory)
    assert generating.missing.keys() == set(CAPABILITIES)
    assert all(reason in why for why in generating.missing.values())


def test_the_author_may_state_how_it_is_called() -> None:
    stated = Generating({"ids": "idx", "new_tokens": "n_tokens"}, missing={"sampling": "it is greedy"})
    told = Subject(Greedy, generating=stated)
    assert told.convention.generating is stated
    assert told.missing("sampling") == "it is greedy"
    assert told.missing("greedy") is None
    assert (
        verify_one(told, next(c for c in CHECKS if c.id == "generation.keeps_prompt"), Settings(5)).status == "passed"
    )


def test_our_own_puts_new_tokens_before_the_padding() -> None:
    generating = found(None)
    assert not generating.missing
    assert not generating.pads_left
    assert not generating.follows_padding


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_transformers_pads_on_the_left(model_type: str) -> None:
    pytest.importorskip("transformers")
    generating = found(f"hf:{model_type}")
    assert generating.pads_left
    assert generating.greedy == {"do_sample": False}
    assert list(generating.missing) == ["temperature_zero"]


def with_default_eos(config: Any) -> nn.Module:
    """As its author has it, who named no end-of-sequence token: the configuration has 2 for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=4 * config.num_heads,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len,
    )
    assert sizes.eos_token_id is not None
    return LlamaForCausalLM(sizes)  # type: ignore[no-any-return]


def test_an_end_token_that_a_transformers_config_has_by_default_is_switched_off() -> None:
    pytest.importorskip("transformers")
    assert found(with_default_eos).fixed == {"eos_token_id": -1}
    for check in ("generation.keeps_prompt", "generation.greedy_is_argmax", "generation.padded_prompt"):
        result = verify_one(subject(with_default_eos), next(c for c in CHECKS if c.id == check), Settings(10))
        assert result.status == "passed", result


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
@pytest.mark.parametrize(
    "factory",
    [Greedy, Sampler, LikeNanoGPT, LikeMinGPT, LikeMamba, LikeXTransformers, LikeMiniMind, AllRequired, OneRow],
)
def test_no_healthy_generate_fails(factory: Any, check: Check) -> None:
    result = verify_one(subject(factory), check, Settings(5))
    assert result.status in ("passed", "skipped"), result


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_no_transformers_generate_fails(check: Check) -> None:
    pytest.importorskip("transformers")
    result = verify_one(subject("hf:llama"), check, Settings(3))
    assert result.status in ("passed", "skipped"), result


def test_who_says_that_its_cache_rolls_is_not_asked_what_follows_past_its_context() -> None:
    check = next(check for check in CHECKS if check.id == "generation.past_context")
    result = verify_one(Subject(Greedy, lacks={"past_context": "the cache rolls"}), check, Settings(3))
    assert (result.status, result.reason) == ("skipped", "the cache rolls")


class OnItsCache(nn.Module):
    """Forward takes no more than so many tokens at once; generate goes on, on a state of all before."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.limit = config.max_seq_len
        self.embed = nn.Embedding(config.vocab_size, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > self.limit:
            raise ValueError(f"{input_ids.shape[1]} tokens are more than {self.limit}")
        return self.step(input_ids, self.embed.weight.new_zeros(len(input_ids), 1, 8))[0]

    def step(self, ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        states = state + self.embed(ids).cumsum(1)
        return -states @ self.embed.weight.T, states[:, -1:]  # what there was is unlikely to come again

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        logits, state = self.step(input_ids, self.embed.weight.new_zeros(len(input_ids), 1, 8))
        for _ in range(max_new_tokens):
            new = logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, new), 1)
            logits, state = self.step(new, self.kept(state, input_ids.shape[1] - 1))
        return input_ids

    def kept(self, state: Tensor, length: int) -> Tensor:
        return state


class OnACacheThatStops(OnItsCache):
    def kept(self, state: Tensor, length: int) -> Tensor:
        return state if length < self.limit else torch.zeros_like(state)


@pytest.mark.parametrize(("factory", "status"), [(OnItsCache, "passed"), (OnACacheThatStops, "failed")])
def test_what_is_generated_on_a_cache_may_pass_the_length_that_forward_takes(factory: Any, status: str) -> None:
    check = next(check for check in CHECKS if check.id == "generation.past_context")
    assert verify_one(Subject(factory), check, Settings(10)).status == status
