"""What strangers' modules do that ours does not: keep, print, refuse, hold complex tables, fail to be built."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.verify import Subject, SubjectError, check_causal_lm
from diymodel.verify.adapters import LM
from diymodel.verify.casting import cast
from diymodel.verify.failure import NotApplicable
from diymodel.verify.reaching import reached
from diymodel.verify.registry import list_checks
from diymodel.verify.report import Failure, Report, Result
from diymodel.verify.subject import resolve
from diymodel.verify.text import to_text
from diymodel.verify.trial import Trial
from diymodel.zoo.base import BASES

CONFIG = {
    "vocab_size": 12,
    "num_layers": 1,
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 2,
    "intermediate_size": 8,
    "max_seq_len": 16,
    "dropout": 0.0,
}


class Keeper(nn.Module):
    """Keeps a list, a buffer, and a loss with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2))
        self.seen: list[Tensor] = []
        self.loss = self.head.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.table += 1
        return self.head(x)  # type: ignore[no-any-return]


def test_what_is_called_aside_leaves_no_trace() -> None:
    module = Keeper()
    lm = LM(module, DIYConfig(), resolve(None).convention)
    table, seen, loss = module.table, module.seen, module.loss
    with lm.aside():
        module(torch.ones(2))
        assert (len(module.seen), module.table[0]) == (1, 1)
        assert module.head.weight.sum() == loss  # the parameters are the module's own, by which gradients are found
    assert module.table is table
    assert module.seen is seen
    assert module.loss is loss
    assert (len(seen), float(table.abs().max())) == (0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_measuring_the_rounding_does_not_write_to_a_cache_that_the_module_keeps(seed: int) -> None:
    """Its keys would be those of the weights that the measuring has changed a little."""
    base = BASES["onmodule"].subject()

    def narrow(config: DIYConfig) -> nn.Module:
        module = base.build(config)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, inputs, output: output.float().to(output.dtype))
        return module

    report = check_causal_lm(narrow, profile="quick", only=["decode.*"], seed=seed)
    assert not report.failed, to_text(report)
    assert any(result.status == "passed" for result in report.results)


class Turning(DIYForCausalLM):
    """Ours, with a complex table that its logits depend on."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        output = super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        turn = torch.view_as_real(self.turns).sum().to(self.lm_head.weight.dtype)
        return (output[0] * turn, output[1]) if isinstance(output, tuple) else output * turn


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float64, torch.complex128), (torch.bfloat16, torch.complex64)])
def test_a_complex_buffer_stays_complex(dtype: torch.dtype, expected: torch.dtype) -> None:
    module = Turning(DIYConfig(**CONFIG))
    before = module.turns.clone()
    assert cast(module, dtype) is module
    assert module.turns.dtype == expected
    assert torch.allclose(module.turns.to(torch.complex64), before)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}


def test_a_complex_buffer_is_lost_on_the_way_to_another_dtype_and_nowhere_else() -> None:
    only = ["decode.cached_equals_full", "numerics.bfloat16_near_float64", "state.moves", "shape.logits"]
    report = check_causal_lm(Turning, profile="quick", only=only)
    assert [result.check.id for result in report.failed] == ["state.moves"]
    assert report.failed[0].failure is not None
    assert "the buffer turns must stay complex, saw it real" in report.failed[0].failure.message


class AssertsItsTable(DIYForCausalLM):
    """As nanochat of 2025-10: its table is bfloat16, whatever the rest is."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.full((config.vocab_size,), 0.3).bfloat16(), persistent=False)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        assert self.table.dtype == torch.bfloat16, "in bfloat16 alone"
        output = super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        return (output[0] * self.table, output[1]) if isinstance(output, tuple) else output * self.table


def test_buffers_whose_type_is_asserted_stay_in_it_and_the_rest_is_verified() -> None:
    convention = Subject(AssertsItsTable).convention
    assert (convention.buffers_stay, convention.dtype) == (True, torch.float64)
    assert "its buffers must stay" in convention.describe()
    assert not Subject(Turning).convention.buffers_stay
    only = ["decode.c*", "numerics.*", "state.*", "shape.logits", "gradients.long_row_finite"]
    report = check_causal_lm(AssertsItsTable, profile="quick", only=only)
    assert report.verdict == "passed", to_text(report)
    found = {result.check.id: (result.status, result.reason) for result in report.results}
    assert found["state.moves"] == (
        "skipped",
        "moved to torch.float32 on cpu, the module does not run: AssertionError: in bfloat16 alone",
    )
    for id in ("decode.cached_equals_full", "numerics.bfloat16_near_float64", "gradients.long_row_finite"):
        assert found[id][0] == "passed", found[id]


@pytest.mark.parametrize(
    ("refuses", "check", "kept"),
    [
        (lambda config: config.num_kv_heads != config.num_heads, "causality.gradient", {"num_kv_heads": 2}),
        (lambda config: config.num_kv_heads != 1, "sensitivity.order_matters", {"num_kv_heads": 1}),
        (lambda config: config.rope_theta != 10000.0, "numerics.bfloat16_near_float64", {"rope_theta": 10000.0}),
        (lambda config: not config.tie_word_embeddings, "numerics.zeros_finite", {"tie_word_embeddings": True}),
    ],
    ids=["no grouped queries", "one group only", "one theta", "always tied"],
)
def test_what_a_family_has_fixed_for_good_keeps_no_check_from_running(
    refuses: Any, check: str, kept: dict[str, Any]
) -> None:
    built: list[DIYConfig] = []

    def choosy(config: DIYConfig) -> nn.Module:
        if refuses(config):
            raise NotImplementedError("not in this family")
        built.append(config)
        return DIYForCausalLM(config)

    report = check_causal_lm(choosy, profile="quick", only=[check])
    assert [(result.status, result.reason) for result in report.results] == [("passed", None)]
    assert {name: getattr(built[-1], name) for name in kept} == kept


def test_a_check_of_what_the_subject_refuses_is_skipped_with_its_reason() -> None:
    def untied(config: DIYConfig) -> nn.Module:
        if config.tie_word_embeddings:
            raise NotImplementedError("no tying here")
        return DIYForCausalLM(config)

    report = check_causal_lm(untied, profile="quick", only=["state.tied_weights_stay_tied", "shape.logits"])
    assert [result.status for result in report.results] == ["passed", "skipped"]
    assert "refuses every configuration that it needs: no tying here" in str(report.results[1].reason)


def test_a_replay_of_a_configuration_that_is_refused_now_does_not_apply() -> None:
    def never(config: DIYConfig) -> nn.Module:
        if config.vocab_size == 13:
            raise NotImplementedError("not thirteen")
        return DIYForCausalLM(config)

    with pytest.raises(NotApplicable, match="refuses this configuration: not thirteen"):
        Trial.replaying(Subject(never, "never"), {}).fresh(DIYConfig(**{**CONFIG, "vocab_size": 13}))


def test_a_tie_by_a_new_parameter_is_told_as_such() -> None:
    def renewed(config: DIYConfig) -> nn.Module:
        module = DIYForCausalLM(replace(config, tie_word_embeddings=False))
        module.lm_head.weight = nn.Parameter(module.model.embed_tokens.weight)
        return module

    report = check_causal_lm(renewed, profile="quick", only=["state.tied_weights_stay_tied"])
    (result,) = report.failed
    assert result.failure is not None
    assert "lie in the same memory and must be one parameter" in result.failure.message
    assert [found.bug for found in report.diagnosis][:1] == ["tie-lost"]


def test_an_error_of_the_factory_is_told_once() -> None:
    """And is no pattern of failures that a bug could be read from."""

    def broken(config: DIYConfig) -> nn.Module:
        if config.num_layers == 1 and config.hidden_size == 2:  # what every failure shrinks to, and no probing builds
            raise AttributeError("no such thing")
        return DIYForCausalLM(config)

    report = check_causal_lm(broken, profile="quick", only=["shape.*", "causality.*", "batch.*"])
    assert len(report.failed) > 4
    ((first, others),) = report.failed_apart
    assert [first.check.id, *others] == [result.check.id for result in report.failed]
    text = to_text(report)
    assert text.count("AttributeError: no such thing") == 1
    assert "fix that first" in text
    assert report.diagnosis == ()


def test_an_error_in_forward_is_told_once_whoever_calls_it() -> None:
    class Broken(DIYForCausalLM):
        def _refuse(self) -> None:
            raise AttributeError("no such thing")

        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            if self.config.vocab_size == 10:  # what every failure shrinks to
                self._refuse()
            return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

        def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0) -> Tensor:
            for _ in range(max_new_tokens):
                input_ids = torch.cat((input_ids, self(input_ids).logits[:, -1:].argmax(-1)), 1)
            return input_ids

    report = check_causal_lm(Broken, profile="quick", only=["shape.logits", "batch.*", "generation.keeps_prompt"])
    assert "generation.keeps_prompt" in {result.check.id for result in report.failed}
    ((first, others),) = report.failed_apart
    assert [first.check.id, *others] == [result.check.id for result in report.failed]


def test_errors_of_two_lines_are_told_apart_though_they_say_the_same() -> None:
    check = next(check for check in list_checks() if check.id == "shape.logits")

    def raised(*lines: int, size: int = 2) -> Result:
        frames = "".join(f'  File "my.py", line {line}, in forward\n    x = y\n' for line in lines)
        return Result(check, "failed", failure=Failure(f"not {size}", (), {}, {}, "", traceback=frames.rstrip()))

    report = Report("x", results=[raised(1, 2), raised(2), raised(2, size=3), raised(2, 1)])
    assert [len(others) for _, others in report.failed_apart] == [2, 0]


def test_a_module_that_cannot_be_copied_is_told_so_and_nothing_else_is_harmed() -> None:
    class Remembering(DIYForCausalLM):
        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            output = super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)
            self.last = output[0] if isinstance(output, tuple) else output
            return output

    module = Remembering(DIYConfig(**CONFIG))
    module(torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(module)
    only = ["state.deepcopy", "numerics.large_activations_finite", "decode.reset", "state.moves"]
    report = check_causal_lm(Remembering, profile="quick", only=only)
    assert [result.check.id for result in report.failed] == ["state.deepcopy"]
    assert not any(result.status == "error" for result in report.results)


def test_what_the_module_prints_is_shown_by_a_replay_only(tmp_path: Path) -> None:
    path = tmp_path / "talkative.py"
    path.write_text(
        "import sys, warnings\n"
        "from diymodel import DIYForCausalLM\n"
        "class LM(DIYForCausalLM):\n"
        "    def forward(self, input_ids, *args, **kwargs):\n"
        "        print('a line', input_ids.shape)\n"
        "        print('another', file=sys.stderr)\n"
        "        return super().forward(input_ids, *args, **kwargs)\n"
    )
    command = [sys.executable, "-m", "diymodel", "verify", f"{path}:LM", "--only", "shape.logits", "--profile", "quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a line" not in done.stdout
    assert done.stderr.count("another") < 100  # of the probing
    values = (
        '{"config":{"vocab_size":12,"max_seq_len":8},"weights":0,"sharpness":1,"rows":1,"length":2,"tokens":[[0,1]]}'
    )
    shown = subprocess.run([*command[:-2], "--replay", values], capture_output=True, text=True, check=False)
    assert "a line" in shown.stdout


def test_what_is_skipped_for_the_same_reason_shares_a_line() -> None:
    report = check_causal_lm("tests/examples/nano_gpt.py:GPT", profile="quick", only=["padding.*"])
    text = to_text(report)
    assert " ".join(text.split()).count("(forward has no attention_mask and no seq_lengths)") == 1
    assert "  – padding.all_padding_finite, padding.content_irrelevant, " in text
    assert all(result.check.id in text for result in report.results)
    assert max(map(len, text.partition("Two results count as equal")[0].splitlines())) <= 120


def test_a_factory_may_import_its_neighbours_once_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_lazy.py").write_text("from diymodel import DIYForCausalLM\n")
    path = tmp_path / "lazy.py"
    path.write_text(
        "def LM(config):\n    from neighbour_of_lazy import DIYForCausalLM\n    return DIYForCausalLM(config)\n"
    )
    assert check_causal_lm(f"{path}:LM", profile="quick", only=["shape.logits"]).verdict == "passed"


def test_a_file_of_a_package_is_told_how_to_be_named(tmp_path: Path) -> None:
    package = tmp_path / "outer" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "model.py").write_text("from .parts import LM\n")
    with pytest.raises(SubjectError, match=rf"write outer\.inner\.model:LM in {re.escape(str(tmp_path))}$"):
        check_causal_lm(f"{package / 'model.py'}:LM")


@pytest.mark.parametrize("seed", range(3))
def test_experts_that_no_token_chose_are_no_parameters_without_gradient(seed: int) -> None:
    only = ["gradients.reach_every_parameter"]
    assert check_causal_lm(BASES["switch"].subject(), profile="quick", seed=seed, only=only).failed == []


def test_a_gradient_below_the_rounding_of_the_largest_is_none() -> None:
    """As that of a router whose weights are divided by their own sum; but what a key's bias gets is nothing else."""
    large, tiny = torch.ones(2, 2), torch.full((2, 2), 1e-17)
    found = {"large": large, "router": tiny, "bias": tiny[0], "cut": None, "unused": torch.zeros(2), "empty": large[:0]}
    assert reached(found, set()) == {"large", "bias"}
    assert reached({**found, "b_K": tiny}, {"b_K", "unused"}) == {"large", "bias", "b_K"}


class Crashing(DIYForCausalLM):
    """A step on the cache, and generation, end in a mistake."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is not None:
            torch.zeros(2) + torch.zeros(3)
        return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:  # type: ignore[override]
        return input_ids["a", max_new_tokens]  # type: ignore[index]


class Refusing(Crashing):
    """They are refused."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is not None:
            raise ValueError("not on a cache")
        return super().forward(input_ids, past_key_values, use_cache)

    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:  # type: ignore[override]
        raise NotImplementedError("some day")


@pytest.mark.parametrize(("module", "status"), [(Crashing, "failed"), (Refusing, "skipped")])
@pytest.mark.parametrize("check", ["decode.cached_equals_full", "generation.greedy_is_argmax"])
def test_what_crashes_is_a_failure_and_what_is_refused_a_lack(module: type[nn.Module], status: str, check: str) -> None:
    report = check_causal_lm(module, profile="quick", only=[check])
    (result,) = report.results
    assert result.status == status, result
    if result.failure is not None:
        assert "the subject raised" in result.failure.message
        assert str(result.failure.traceback).count("test_strangers.py")
