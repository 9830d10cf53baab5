"""What a ``generate`` of a stranger's own is taken to have: by its signature, with its defaults out of the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from tests.test_generating import LikeMinGPT, LikeMiniMind, LikeNanoGPT, OneRow, Pairs, found, subject

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


class CrashesNowAndThen(Pairs):
    """Of short answers it is right; always drawn, and by a probability below 0 where they are longer."""

    def generate(self, idx: Tensor, max_new_tokens: int, top_p: float = 0.9) -> Tensor:
        idx = self.following(idx, max_new_tokens)
        torch.multinomial(torch.tensor([1.0, 2.0 - max_new_tokens]), 1)
        return idx


def test_a_plain_call_that_crashes_at_times_is_a_bug_and_drawing_is_none() -> None:
    assert {"greedy", "sampling"} <= found(CrashesNowAndThen).missing.keys()
    result = verify_one(subject(CrashesNowAndThen), CHECKS["generation.keeps_prompt"], Settings(5))
    assert result.failure is not None, result
    assert "probability tensor contains" in result.failure.message


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


class DrawsAtZero(LikeNanoGPT):
    """A temperature of 0 is taken for not given."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        return super().generate(idx, max_new_tokens, temperature or 1.0, top_k)


class DrawsAmongOne(LikeNanoGPT):
    """At a temperature of 0 it divides by next to nothing; nothing but top_k=1 is wrong."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        return super().generate(idx, max_new_tokens, temperature or 1e-9, 3 if top_k == 1 else top_k)


class SamplesAnyway(LikeMinGPT):
    """Told not to sample, it does."""

    def generate(  # type: ignore[override]
        self, idx: Tensor, max_new_tokens: int, do_sample: bool = False, top_k: int | None = None
    ) -> Tensor:
        return super().generate(idx, max_new_tokens, do_sample=True, top_k=top_k)


@pytest.mark.parametrize(
    ("factory", "greedy", "failing"),
    [
        (DrawsAtZero, {"top_k": 1}, "generation.temperature_zero"),
        (DrawsAmongOne, {"temperature": 0.0}, "generation.top_k"),
        (SamplesAnyway, {"do_sample": False}, "generation.greedy_is_argmax"),
    ],
)
def test_greedy_is_what_does_not_draw_and_what_draws_instead_is_one_failure(
    factory: Any, greedy: dict[str, Any], failing: str
) -> None:
    assert found(factory).greedy == greedy
    for check in ("generation.temperature_zero", "generation.top_k", "generation.greedy_is_argmax"):
        result = verify_one(subject(factory), CHECKS[check], Settings(10))
        assert (result.status == "failed") == (check == failing), result


# --- forms of prompts, and of what comes back -------------------------------------------------------------------------


class OnePrompt(Pairs):
    """litgpt's: (T,) and how many to return, (T + N,)."""

    def generate(self, prompt: Tensor, max_returned_tokens: int) -> Tensor:
        T = prompt.size(0)
        if max_returned_tokens <= T:
            raise ValueError(f"{max_returned_tokens} are no more than the prompt")
        for _ in range(max_returned_tokens - T):
            prompt = torch.cat((prompt, self(prompt[None])[0, -1].argmax(-1, keepdim=True)))
        return prompt


class OneList(Pairs):
    def generate(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        for _ in range(max_new_tokens):
            prompt = [*prompt, int(self(torch.tensor([prompt]))[0, -1].argmax())]
        return prompt


class ListOfRows(OneList):
    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:  # type: ignore[override]
        return [OneList.generate(self, prompt, max_new_tokens) for prompt in prompts]


class YieldsNumbers(Pairs):
    def generate(self, ids: Tensor, max_new_tokens: int) -> Any:
        for _ in range(max_new_tokens):
            token = self(ids)[0, -1].argmax()
            ids = torch.cat((ids, token.view(1, 1)), 1)
            yield token.item()


class YieldsColumns(Pairs):
    def generate(self, ids: Tensor, max_new_tokens: int) -> Any:
        for _ in range(max_new_tokens):
            tokens = self(ids)[:, -1].argmax(-1)
            ids = torch.cat((ids, tokens[:, None]), 1)
            yield tokens


class YieldsAllSoFar(YieldsColumns):
    def generate(self, ids: Tensor, max_new_tokens: int) -> Any:
        for tokens in super().generate(ids, max_new_tokens):
            ids = torch.cat((ids, tokens[:, None]), 1)
            yield ids


class WithMore(Pairs):
    """Scores and whether rows have ended stand beside the token ids."""

    def generate(self, ids: Tensor, max_new_tokens: int) -> Any:
        found = self.following(ids, max_new_tokens)
        return self(found), torch.zeros(len(ids), dtype=torch.bool), found, {"seconds": 0.1}


class InADict(Pairs):
    def generate(self, ids: Tensor, max_new_tokens: int) -> Any:
        return {"seconds": 0.1, "tokens": self.following(ids, max_new_tokens)}


class ListWithMore(OneList):
    def generate(self, prompt: list[int], max_new_tokens: int) -> Any:
        return super().generate(prompt, max_new_tokens), 0.1


class YieldsWithState(Pairs):
    """Each token with the state after it, of a prompt (T,), until the end token, which is not yielded."""

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, eos_token_id: int = 0) -> Any:
        if ids.dim() != 1:
            raise ValueError("one prompt (T,)")
        for _ in range(max_new_tokens):
            longer = self.following(ids[None], 1, temperature)[0]
            if self.ends(int(longer[-1]), eos_token_id):
                return
            ids = longer
            yield int(ids[-1]), self.embed(ids[-1])

    def ends(self, token: int, eos: int) -> bool:
        return token == eos


class YieldsWithStates(YieldsWithState):
    """mamba2-minimal: the states of all layers, in a list."""

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 1.0, eos_token_id: int = 0) -> Any:
        for token, state in super().generate(ids, max_new_tokens, temperature, eos_token_id):
            yield token, [state, state]


class YieldsAmongFifty(YieldsWithState):
    """It draws among more tokens than there are."""

    def generate(self, ids: Tensor, max_new_tokens: int, top_k: int = 50) -> Any:  # type: ignore[override]
        if top_k > self.head.out_features:
            raise ValueError(f"no {top_k} tokens to draw among")
        return super().generate(ids, max_new_tokens, temperature=float(top_k == 0), eos_token_id=-1)


@pytest.mark.parametrize(
    ("factory", "form", "one_row", "counts_prompt", "returns_prompt"),
    [
        (OnePrompt, "row", True, True, True),
        (OneList, "list", True, False, True),
        (ListOfRows, "lists", False, False, True),
        (YieldsNumbers, "rows", True, False, False),
        (YieldsColumns, "rows", False, False, False),
        (YieldsAllSoFar, "rows", False, False, True),
        (WithMore, "rows", False, False, True),
        (InADict, "rows", False, False, True),
        (ListWithMore, "list", True, False, True),
        (YieldsWithState, "row", True, False, False),
        (YieldsWithStates, "row", True, False, False),
        (YieldsAmongFifty, "row", True, False, False),
    ],
)
def test_prompts_and_tokens_come_in_many_forms(
    factory: Any, form: str, one_row: bool, counts_prompt: bool, returns_prompt: bool
) -> None:
    own = found(factory)
    assert (own.form, own.one_row, own.counts_prompt, own.returns_prompt) == (
        form,
        one_row,
        counts_prompt,
        returns_prompt,
    )
    for check in ("generation.keeps_prompt", "generation.greedy_is_argmax"):
        assert verify_one(subject(factory), CHECKS[check], Settings(5)).status == "passed"


def test_a_wrong_token_of_any_form_is_seen() -> None:
    class Second(OneList):
        def generate(self, prompt: list[int], max_new_tokens: int) -> list[int]:
            *most, last = super().generate(prompt, max_new_tokens)
            return [*most, (last + 1) % self.head.out_features]

    class SecondWithMore(Second):
        def generate(self, prompt: list[int], max_new_tokens: int) -> Any:
            return torch.tensor([super().generate(prompt, max_new_tokens)]), False

    for factory in (Second, SecondWithMore):
        result = verify_one(subject(factory), CHECKS["generation.greedy_is_argmax"], Settings(5))
        assert result.status == "failed", result


class EndsEarly(YieldsWithState):
    """Half of the other tokens end it as well."""

    def ends(self, token: int, eos: int) -> bool:
        return eos >= 0 and token % 2 == eos % 2


class EndsAlways(YieldsWithState):
    def ends(self, token: int, eos: int) -> bool:
        return True


@pytest.mark.parametrize(
    ("factory", "check", "status"),
    [
        (YieldsWithState, "generation.eos_per_row", "passed"),
        (OneRow, "generation.eos_per_row", "passed"),
        (EndsEarly, "generation.eos_per_row", "failed"),
        (EndsAlways, "generation.keeps_prompt", "failed"),
        (EndsAlways, "generation.greedy_is_argmax", "failed"),
    ],
)
def test_a_row_may_end_at_once_by_its_end_token_alone(factory: Any, check: str, status: str) -> None:
    result = verify_one(subject(factory), CHECKS[check], Settings(40))
    assert result.status == status, result


# --- what is a refusal, and what a mistake ----------------------------------------------------------------------------


class AlwaysWrong(Pairs):
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        first, second = idx.shape, max_new_tokens
        rows, length, _ = first
        return idx[:, : rows + length + second]


class AlwaysRefuses(Pairs):
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        if idx.shape[1] < 10**6:
            raise RuntimeError(
                f"no less than a million tokens: {idx.shape[1]}",
            )
        return idx


def test_a_generate_that_always_fails_by_mistake_has_a_bug_and_one_that_refuses_is_none() -> None:
    result = verify_one(subject(AlwaysWrong), CHECKS["generation.keeps_prompt"], Settings(5))
    assert result.failure is not None
    assert "not enough values to unpack" in result.failure.message
    result = verify_one(subject(AlwaysRefuses), CHECKS["generation.keeps_prompt"], Settings(5))
    assert (result.status, "no less than a million" in str(result.reason)) == ("skipped", True)


def test_what_a_generation_leaves_is_asked_with_room_for_a_new_token() -> None:
    result = verify_one(subject(LikeMinGPT), CHECKS["generation.leaves_nothing"], Settings(40, 1))
    assert result.status == "passed", result


# --- after the end ----------------------------------------------------------------------------------------------------


class GoesOn(Pairs):
    """Until all rows have ended; what stands after the end of one is ``fill``, or what the model goes on with."""

    fill: int | None = None

    def generate(self, idx: Tensor, max_new_tokens: int, eos_token_id: int = -1) -> Tensor:
        ended = torch.zeros(len(idx), dtype=torch.bool)
        for _ in range(max_new_tokens):
            tokens = self(idx)[:, -1].argmax(-1)
            tokens = tokens if self.fill is None else tokens.masked_fill(ended, self.fill)
            ended |= tokens == eos_token_id
            idx = torch.cat((idx, tokens[:, None]), 1)
            if bool(ended.all()):
                break
        return idx


class FillsUp(GoesOn):
    fill = 0


@pytest.mark.parametrize(("factory", "status"), [(GoesOn, "failed"), (FillsUp, "passed")])
def test_after_its_end_a_row_is_filled_up_by_one_token_where_generate_takes_no_pad(factory: Any, status: str) -> None:
    result = verify_one(subject(factory), CHECKS["generation.eos_per_row"], Settings(40))
    assert result.status == status, result
    if result.failure is not None:
        assert "must hold only one token that fills it up" in result.failure.message


def in_eval_mode(function: Any) -> Any:
    """A decorator that hides what it decorates, as those of lucidrains' repositories."""

    def inner(module: Any, *args: Any, **kwargs: Any) -> Any:
        was_training = module.training
        module.eval()
        found = function(module, *args, **kwargs)
        module.train(was_training)
        return found

    return inner


class Decorated(Pairs):
    """With his filter, which leaves nothing of a vocabulary of fewer than ten tokens."""

    @torch.no_grad()
    @in_eval_mode
    def generate(self, prime: Tensor, seq_len: int, temperature: float = 1.0, filter_thres: float = 0.9) -> Tensor:
        out = prime
        for _ in range(seq_len):
            logits = self(out)[:, -1]
            kept = logits.topk(int((1 - filter_thres) * logits.shape[-1]))[1]
            logits = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((logits / temperature).softmax(-1), 1)
            out = torch.cat((out, token), 1)
        return out[:, prime.shape[1] :]


def test_a_generate_behind_a_decorator_that_hides_it_is_called_by_its_own_names() -> None:
    own = found(Decorated)
    assert own.names == {
        "ids": "prime",
        "new_tokens": "seq_len",
        "temperature": "temperature",
        "filter": "filter_thres",
    }
    assert own.fixed == {"filter_thres": 0.0}
    for check in ("generation.keeps_prompt", "generation.greedy_is_argmax", "generation.follows_distribution"):
        assert verify_one(subject(Decorated), CHECKS[check], Settings(5)).status == "passed"


class DropsTheCrossing(Pairs):
    """One token always stays, and so a tiny top_p is right; the one that crosses goes."""

    def generate(self, idx: Tensor, max_new_tokens: int, top_p: float = 1.0) -> Tensor:
        for _ in range(max_new_tokens):
            ranked, order = self(idx)[:, -1].softmax(-1).sort(-1, descending=True)
            gone = self.gone(ranked, top_p)
            gone[:, 0] = False
            kept = ranked.masked_fill(gone, 0)
            idx = torch.cat((idx, order.gather(1, torch.multinomial(kept, 1))), 1)
        return idx

    def gone(self, ranked: Tensor, top_p: float) -> Tensor:
        return ranked.cumsum(-1) > top_p


class KeepsTheCrossing(DropsTheCrossing):
    def gone(self, ranked: Tensor, top_p: float) -> Tensor:
        return ranked.cumsum(-1) - ranked >= top_p


@pytest.mark.parametrize(("factory", "status"), [(DropsTheCrossing, "failed"), (KeepsTheCrossing, "passed")])
def test_the_token_that_crosses_top_p_stays(factory: Any, status: str) -> None:
    result = verify_one(subject(factory), CHECKS["generation.top_p"], Settings(10))
    assert result.status == status, result
    if result.failure is not None:
        assert "tokens reach, must leave token" in result.failure.message


class FailsFromTheSecondOn(Pairs):
    """The first new token is right; the next call, as on a cache of a wrong shape, fails by mistake."""

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        start = idx.shape[1]
        for _ in range(max_new_tokens):
            logits = self(idx)[:, -1] / temperature
            logits = (logits * torch.ones(1, 1 if idx.shape[1] == start else 3)).view(len(idx), -1)
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(top_k)[0][:, -1:], -torch.inf)
            idx = torch.cat((idx, torch.multinomial(logits.softmax(-1), 1)), 1)
        return idx


def test_where_longer_calls_fail_by_mistake_shorter_ones_are_still_greedy() -> None:
    assert found(FailsFromTheSecondOn).greedy == {"top_k": 1}
    result = verify_one(subject(FailsFromTheSecondOn), CHECKS["generation.greedy_is_argmax"], Settings(5))
    assert result.failure is not None
    assert "must match the size" in result.failure.message
