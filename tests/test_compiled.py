"""``generate(compile=True)``: the tokens of ``compile=False``, compiled once.

Where the compiler's own code does not matter, torch's tracer runs alone (``counted``), with all its guards: whatever
would compile anew there is counted. What is then generated takes seconds, and is held once, in the slow tests.
"""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.compiled import compiled_decoder
from diymodel.verify import Subject, check_causal_lm

CONFIG = DIYConfig(
    vocab_size=31, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, max_seq_len=512, dropout=0.1
)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's trace of itself, which pytest would keep, takes longer than compiling."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler


def sharp_model(dtype: torch.dtype = torch.float64, gain: float = 2.0, **changes: Any) -> DIYForCausalLM:
    """Weights under which every token matters: at a gain of 2, small differences grow from layer to layer."""
    torch.manual_seed(0)
    model = DIYForCausalLM(DIYConfig.from_dict(CONFIG.to_dict() | changes)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=gain / weight.shape[1] ** 0.5)
    return model


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts compilations, of which nothing but the tracing is done."""
    from torch._dynamo.testing import CompileCounter

    counter, real = CompileCounter(), torch.compile

    def compile_(function: Any, **settings: Any) -> Any:
        return real(function, **{**settings, "options": None, "backend": counter})

    monkeypatch.setattr(torch, "compile", compile_)
    yield counter
    torch._dynamo.reset()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"attention_mask": MASK},
    {"attention_mask": MASK, "eos_token_id": [3, 5, 7], "pad_token_id": 2},
    {"temperature": 0.9, "top_p": 0.9, "seed": 3},
    {"attention_mask": MASK, "temperature": 1.5, "top_k": 7, "repetition_penalty": 1.3, "seed": 4},
]


def test_tokens_are_those_of_eager_and_one_compilation_serves_all(counted: Any) -> None:
    model = sharp_model()
    for training in (False, True):
        model.train(training)
        for settings in SETTINGS:
            streamed: list[Tensor] = []
            expected = model.generate(prompts(3, 5), 70, **settings)
            found = model.generate(prompts(3, 5), 70, **settings, compile=True, on_token=streamed.append)
            assert torch.equal(found, expected)
            assert len(streamed) == expected.shape[1] - 5
            assert model.training == training
    assert counted.frame_count == 1


def test_every_length_of_a_capacity_is_compiled_once(counted: Any) -> None:
    model = sharp_model()
    for length, new in ((1, 2), (1, 40), (5, 122), (100, 27), (126, 1), (20, 60)):
        ids = prompts(1, length)
        assert torch.equal(model.generate(ids, new, compile=True), model.generate(ids, new))
    assert counted.frame_count == 1
    model.generate(prompts(1, 5), 123, compile=True)  # 128 positions: the next capacity
    assert counted.frame_count == 2
    model.generate(prompts(2, 5), 10, compile=True)
    assert counted.frame_count == 3
    model.generate(prompts(1, 5), 10, compile=True)
    assert counted.frame_count == 3


def test_up_to_max_seq_len(counted: Any) -> None:
    model = sharp_model(max_seq_len=20)
    assert torch.equal(model.generate(prompts(1, 5), 15, compile=True), model.generate(prompts(1, 5), 15))


def test_nothing_is_compiled_where_no_step_follows_the_prompt(counted: Any) -> None:
    model = sharp_model()
    for new in (0, 1):
        assert torch.equal(model.generate(prompts(1, 5), new, compile=True), model.generate(prompts(1, 5), new))
    assert counted.frame_count == 0


def test_changed_weights_are_seen_and_a_changed_model_is_compiled_anew(counted: Any) -> None:
    model, ids = sharp_model(), prompts(2, 5)

    def same() -> bool:
        return torch.equal(model.generate(ids, 30, compile=True), model.generate(ids, 30))

    assert same()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    assert same()
    model.load_state_dict(sharp_model().state_dict())
    assert same()
    assert counted.frame_count == 1
    model.model.norm.eps = 3.0
    assert same()
    assert counted.frame_count == 2
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: -output)
    assert same()
    assert counted.frame_count == 3
    model.float()
    assert same()
    assert counted.frame_count == 4


def test_a_nan_of_one_generation_does_not_reach_the_next(counted: Any) -> None:
    model, ids = sharp_model(), prompts(1, 5)
    expected = model.generate(ids, 30)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    model.generate(ids, 30, compile=True)
    model.load_state_dict(weights)
    assert torch.equal(model.generate(ids, 30, compile=True), expected)
    assert counted.frame_count == 1


def test_a_generation_within_a_generation_disturbs_none(counted: Any) -> None:
    model, ids = sharp_model(), prompts(1, 5)
    inner: list[Tensor] = []

    def interrupt(new: Tensor) -> None:
        if len(inner) < 2:
            inner.append(model.generate(ids.flip(1), 10, compile=True))

    assert torch.equal(model.generate(ids, 10, compile=True, on_token=interrupt), model.generate(ids, 10))
    for found in inner:
        assert torch.equal(found, model.generate(ids.flip(1), 10))


def test_many_models_are_each_compiled(counted: Any) -> None:
    """Torch gives up at the eighth compilation of a function; here, to be quick, at the second."""
    with torch._dynamo.config.patch(cache_size_limit=1):
        for number in (1, 2, 3):
            model = sharp_model(num_layers=1, rope_theta=100.0 * number, rms_norm_eps=0.1 * number)
            assert torch.equal(model.generate(prompts(1, 5), 5, compile=True), model.generate(prompts(1, 5), 5))
    assert counted.frame_count == 3


def test_copies_begin_with_nothing_compiled(counted: Any) -> None:
    model, ids = sharp_model(), prompts(1, 5)
    expected = model.generate(ids, 10, compile=True)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, 10, compile=True), expected)
    assert counted.frame_count == 4
    assert model.state_dict().keys() == sharp_model().state_dict().keys()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_global_random_state_is_left_alone(counted: Any, temperature: float) -> None:
    model = sharp_model()
    before = torch.get_rng_state()
    model.generate(prompts(1, 5), 5, compile=True, temperature=temperature)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_compiled_is_refused() -> None:
    model = sharp_model()
    with pytest.raises(ValueError, match="use_cache=False has none: drop one of them"):
        model.generate(prompts(1, 5), 5, compile=True, use_cache=False)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"under torch.autocast: .*bfloat16\(\)"),
    ):
        model.generate(prompts(1, 5), 5, compile=True)
    with pytest.raises(ValueError, match="token id 99 is outside the vocabulary"):
        model.generate(torch.tensor([[1, 99]]), 5, compile=True)


def test_a_missing_compiler_is_said_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = torch.compile, []

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin the usual places")

    monkeypatch.setattr(torch, "compile", lambda f, **settings: real(f, fullgraph=True, backend=broken))
    model = sharp_model()
    with pytest.raises(
        ValueError, match=r"1 rows and 128 positions: .*No working C\+\+ compiler found.*g\+\+ on the PATH"
    ):
        model.generate(prompts(1, 5), 5, compile=True, on_token=seen.append)
    assert not seen
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_compiled_logits_are_near_those_of_eager(dtype: torch.dtype, relative: float) -> None:
    """On a prompt of ragged rows; the compiler's own code, as a user gets it."""
    model = sharp_model(dtype).eval()
    ids, lengths = prompts(3, 120), torch.tensor([5, 2, 4])
    rows = torch.arange(3)
    with torch.inference_mode(), compiled_decoder(model, 3, 120) as decoder:
        _, past = model(ids[:, :5], seq_lengths=lengths, use_cache=True)
        decoder.start(past, 5)
        for step in range(100):
            tokens = ids[rows, lengths + step][:, None]
            expected, past = model(tokens, past_key_values=past, use_cache=True)
            assert float((decoder.step(tokens) - expected).norm() / expected.norm()) <= relative
    if dtype == torch.float32:
        for settings in SETTINGS:
            found, expected = (model.generate(ids[:, :5], 70, **settings, compile=c) for c in (True, False))
            assert torch.equal(found, expected)


class Compiled(DIYForCausalLM):
    """Whose ``generate`` is compiled where it can be."""

    def generate(  # type: ignore[override]
        self, input_ids: Tensor, max_new_tokens: int, *, use_cache: bool = True, **settings: Any
    ) -> Tensor:
        return super().generate(input_ids, max_new_tokens, use_cache=use_cache, compile=use_cache, **settings)


def test_the_harness_passes_generation_on_fixed_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ``compile=True`` does but for compiling, which takes seconds a model and is held to it above."""
    monkeypatch.setattr(torch, "compile", lambda step, **settings: step)
    subject = Subject(Compiled, "compiled", claims=("cache_value", "strict_context", "strict_generation"))
    report = check_causal_lm(subject, profile="standard", only=["generation.*"])
    passed = {result.check.id for result in report.results if result.status == "passed"}
    assert report.verdict == "passed"
    assert {"generation.cached_greedy_is_argmax", "generation.overlong_refused"} <= passed
