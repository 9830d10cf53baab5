"""What generate refuses, the exact form of its result, and its small print.

That it takes the likeliest token, row by row, and leaves no trace is checked by the harness: tests/properties.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.generate import _penalise, choose
from diymodel.verify.trial import draw_weights
from tests.strategies import SEEDS, Case, cases, lengths

CONFIG = DIYConfig(vocab_size=11, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=8, dropout=0.0)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


NEW = 4  # most new tokens of a random case
CASES = cases(room=NEW)


@pytest.fixture(scope="module")
def model() -> DIYForCausalLM:
    torch.manual_seed(0)
    return DIYForCausalLM(CONFIG).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_new_tokens": 6},
            r"prompt of 3 tokens and max_new_tokens=6 make 9 .* max_seq_len=8: at most 5 new tokens",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0"),
        ({"temperature": -0.5}, "temperature=-0.5 must be a finite number, 0 or above"),
        (
            {"input_ids": torch.ones(1, 9, dtype=torch.int64), "max_new_tokens": 0},
            r"prompt of 9 tokens and max_new_tokens=0 make 9 .* at most 0 new tokens fit",
        ),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be a finite number above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"seed": 1, "generator": torch.Generator()}, "give one of them"),
        ({"seed": 2**64}, r"seed=18446744073709551616 must be in \[0, 2\*\*64\)"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"eos_token_id": 11}, r"eos_token_id=11 is outside the vocabulary \[0, 11\)"),
        ({"eos_token_id": [3, -1]}, "eos_token_id=-1 is outside"),
        ({"pad_token_id": 11}, "pad_token_id=11 is outside"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token to continue from"),
        ({"input_ids": torch.tensor([1, 2])}, r"must be \(batch, seq\) .* got \(2,\)"),
        ({"input_ids": torch.tensor([[1, 99]])}, "token id 99 is outside the vocabulary"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "row 1 of attention_mask has no token"),
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, "padding on the right only"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_token(
    model: DIYForCausalLM, arguments: dict[str, Any], message: str
) -> None:
    seen: list[torch.Tensor] = []
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": IDS, "max_new_tokens": 2, "on_token": seen.append} | arguments)
    assert not seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number, not a float"),
        ({"temperature": 1.0, "seed": 1.5}, "seed=1.5 must be a whole number, not a float"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k=2.5 must be a whole number, not a float"),
        ({"eos_token_id": "ab"}, "eos_token_id='ab' must be a whole number, not a str"),
        ({"eos_token_id": [3, None]}, "eos_token_id=None must be a whole number, not a NoneType"),
        ({"pad_token_id": 0.0}, "pad_token_id=0.0 must be a whole number, not a float"),
    ],
)
def test_what_must_be_a_whole_number_is_one(model: DIYForCausalLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.generate(**{"input_ids": IDS, "max_new_tokens": 2} | arguments)


def test_the_largest_seed_and_whole_numbers_of_torch_are_taken(model: DIYForCausalLM) -> None:
    model.generate(IDS, 2, temperature=1.0, seed=2**64 - 1)
    assert torch.equal(
        model.generate(IDS, 4, eos_token_id=torch.tensor([3, 4])), model.generate(IDS, 4, eos_token_id=[3, 4])
    )


def test_settings_that_greedy_ignores_are_said(model: DIYForCausalLM) -> None:
    for settings in ({"top_k": 3, "top_p": 0.5, "seed": 7}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.warns(UserWarning, match="top_k and top_p are ignored at temperature 0") as warned:
            generated = model.generate(IDS, 4, **settings)
        assert [warning.filename for warning in warned] == [__file__]
    assert torch.equal(generated, model.generate(IDS, 4))


def test_zero_new_tokens_give_the_prompt_back(model: DIYForCausalLM) -> None:
    assert torch.equal(model.generate(IDS, 0), IDS)


def test_the_result_is_an_ordinary_tensor(model: DIYForCausalLM) -> None:
    generated = model.generate(IDS, 2)
    assert not generated.is_inference()
    assert generated.dtype == torch.int64

    assert model.generate(IDS.int(), 2).dtype == torch.int64


def test_the_cache_is_used_unless_told_otherwise(model: DIYForCausalLM) -> None:
    for settings, calls in (({}, 3), ({"use_cache": False}, 0)):
        with mock.patch.object(model, "decode_step", side_effect=model.decode_step) as step:
            model.generate(IDS, 4, **settings)
        assert step.call_count == calls


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}, {"repetition_penalty": 2.0}])
def test_each_token_is_the_likeliest_after_the_penalty(model: DIYForCausalLM, settings: dict[str, float]) -> None:
    """Of the row's real tokens, the drawn ones with them; positive logits are divided, negative ones multiplied."""
    penalty = settings.get("repetition_penalty", 1.0)
    sharp = copy.deepcopy(model)
    draw_weights(sharp, 0, 2)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 7, 8]]
    mask = torch.tensor([[1] * len(row) + [0] * (4 - len(row)) for row in prompts])
    found = sharp.generate(torch.tensor([row + [9] * (4 - len(row)) for row in prompts]), 4, mask, **settings)
    for row, prompt in zip(found.tolist(), prompts, strict=True):
        tokens = list(prompt)
        for _ in range(4):
            logits = sharp(torch.tensor([tokens]))[0, -1].tolist()
            for token in set(tokens):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            tokens.append(logits.index(max(logits)))
        assert row[: len(tokens)] == tokens


def test_a_finished_row_stays_finished(model: DIYForCausalLM) -> None:
    drawn = [torch.tensor(step) for step in ([7, 1], [2, 2], [3, 3], [4, 7])]
    with mock.patch.object(importlib.import_module("diymodel.generate"), "choose", side_effect=drawn):
        generated = model.generate(IDS, 5, eos_token_id=7, pad_token_id=0)
    assert generated[:, 3:].tolist() == [[7, 0, 0, 0], [1, 2, 3, 7]]


def test_without_a_seed_the_draws_differ(model: DIYForCausalLM) -> None:
    drawn = {tuple(model.generate(IDS[:1], 5, temperature=10.0)[0].tolist()) for _ in range(10)}
    assert len(drawn) > 1


def test_a_generator_of_ones_own_goes_on_from_call_to_call(model: DIYForCausalLM) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = [model.generate(IDS[:1], 5, temperature=10.0, generator=generator).tolist() for _ in range(2)]
    assert drawn[0] == model.generate(IDS[:1], 5, temperature=10.0, seed=3).tolist() != drawn[1]


def test_streaming_sees_every_new_token(model: DIYForCausalLM) -> None:
    seen: list[list[int]] = []
    generated = model.generate(IDS, 4, on_token=lambda new: seen.append(new.tolist()))
    assert torch.tensor(seen).T.tolist() == generated[:, 3:].tolist()


@given(
    case=CASES,
    new=st.integers(0, NEW),
    seed=SEEDS,
    temperature=st.sampled_from((1.0, 0.5, 10.0)),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.sampled_from((0.1, 0.5, 0.9, 1.0)),
    repetition_penalty=st.sampled_from((1.0, 1.5)),
)
def test_a_seed_draws_the_same_with_and_without_cache(case: Case, new: int, **settings: Any) -> None:
    model = case.model()
    cached = model.generate(case.input_ids, new, **settings)
    assert torch.equal(model.generate(case.input_ids, new, use_cache=False, **settings), cached)


@given(case=CASES, new=st.integers(0, NEW), data=st.data())
def test_each_row_is_its_prompt_then_what_it_gets_alone_then_padding(case: Case, new: int, data: st.DataObject) -> None:
    """Up to its own end-of-sequence token; the result is as long as the longest prompt and the steps that were made."""
    model, row_lengths = case.model(), data.draw(lengths(case), "lengths")
    prompts = [row[:length] for row, length in zip(case.tokens, row_lengths.tolist(), strict=True)]
    alone = [model.generate(torch.tensor([prompt]), new)[0, len(prompt) :].tolist() for prompt in prompts]
    eos = data.draw(st.sampled_from([*alone[0], None]), "eos")
    padding = data.draw(st.integers(0, case.config.vocab_size - 1), "padding")
    ended = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in alone]
    width = max(map(len, prompts)) + max(map(len, ended))
    rows = [prompt + tokens for prompt, tokens in zip(prompts, ended, strict=True)]
    expected = [row + [padding] * (width - len(row)) for row in rows]
    mask = (torch.arange(case.length) < row_lengths[:, None]).long()
    for use_cache in (True, False):
        found = model.generate(case.input_ids, new, mask, eos_token_id=eos, pad_token_id=padding, use_cache=use_cache)
        assert found.tolist() == expected


@given(case=CASES, data=st.data())
def test_a_failing_callback_leaves_no_trace(case: Case, data: st.DataObject) -> None:
    """Every part is back in its own mode, and torch's random state is as it was."""
    model = case.model()
    for part in model.modules():
        part.training = data.draw(st.booleans())
    modes, random_state = [part.training for part in model.modules()], torch.get_rng_state()

    def fail(_tokens: torch.Tensor) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        model.generate(case.input_ids, 1, temperature=1.0, seed=0, on_token=fail)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("arguments", "config_pad", "expected"),
    [
        ({}, None, 0),
        ({"eos_token_id": []}, None, 0),
        ({"pad_token_id": 0}, 5, 0),
        ({"eos_token_id": [7, 9]}, None, 7),
        ({"eos_token_id": 7}, 5, 5),
        ({"pad_token_id": 2}, 5, 2),
    ],
)
def test_which_token_pads(arguments: dict[str, Any], config_pad: int | None, expected: int) -> None:
    model = DIYForCausalLM(DIYConfig.from_dict(CONFIG.to_dict() | {"pad_token_id": config_pad}))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert model.generate(IDS, 0, mask, **arguments)[1, 1:].tolist() == [expected, expected]


def test_a_penalty_pushes_every_seen_token_down() -> None:
    """With a huge penalty, greedy decoding repeats neither the prompt nor itself while unseen ones remain."""
    model = DIYForCausalLM(CONFIG)
    draw_weights(model, 2, 2)
    plain, penalised = (model.generate(IDS[:1], 5, repetition_penalty=p)[0].tolist() for p in (1.0, 1e6))
    assert len(set(plain[3:])) < 5
    assert len(set(penalised)) == len(penalised)


def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]])
    assert _penalise(logits, seen, 4.0).tolist() == [[0.5, -8.0, 3.0, -3.0]]


@pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-300])
def test_a_vanishing_temperature_is_greedy_not_nan(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert choose(logits, temperature, None, None, torch.Generator().manual_seed(0)).tolist() == [1]


def test_a_vanishing_temperature_measures_each_row_by_its_own_largest_logit() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1001.0, 1003.0, 1004.0]])
    assert choose(logits, 1e-37, None, None, torch.Generator().manual_seed(0)).tolist() == [1, 2]


def test_one_candidate_is_the_likeliest(model: DIYForCausalLM) -> None:
    greedy = model.generate(IDS, 4)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(model.generate(IDS, 4, temperature=50.0, seed=1, **settings), greedy)
    assert torch.equal(model.generate(IDS[:1], 4, temperature=50.0, seed=1, top_k=1), greedy[:1])


def test_top_k_keeps_exactly_k_among_equals() -> None:
    logits = torch.zeros(2000, 4)
    drawn = choose(logits, 1.0, 2, None, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == 2


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, None, 0.7, generator).tolist()) == {0, 1}
    assert set(choose(logits, 1.0, None, 0.81, generator).tolist()) == {0, 1, 2}
    halves = torch.tensor([0.5, 0.25, 0.25]).log().expand(2000, 3)
    assert set(choose(halves, 1.0, None, 0.5, generator).tolist()) == {0}  # which just reaches it


def test_half_logits_are_drawn_from_in_float32() -> None:
    logits = torch.randn(500, 50, generator=torch.Generator().manual_seed(1)).half()
    drawn = [choose(x, 0.7, 40, 0.95, torch.Generator().manual_seed(0)) for x in (logits, logits.float())]
    assert torch.equal(*drawn)
    near = torch.tensor([0.0, -(2.0**-12)]).half().expand(500, 2)  # e^-4 apart at the least temperature of float16
    assert choose(near, 1e-6, None, None, torch.Generator().manual_seed(0)).tolist() == [0] * 500


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(probabilities.log().expand(20000, 4), 1.0, None, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.bincount(drawn, minlength=4) / 20000, probabilities, atol=0.012, rtol=0)


@pytest.mark.parametrize("ids", [[[1.7, 2.3]], [[True, False]], [[1, 99]]])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5}, {"use_cache": False}])
@pytest.mark.parametrize("new_tokens", [0, 2])
def test_a_prompt_that_is_no_tokens_is_refused(ids: list[list[Any]], settings: dict[str, Any], new_tokens: int) -> None:
    model = DIYForCausalLM(DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=16))
    with pytest.raises(ValueError, match=r"input_ids must be int64 token ids|outside the vocabulary"):
        model.generate(torch.tensor(ids), new_tokens, **settings)
