"""A Hugging Face directory as SUBJECT: its family made small, its own weights as they are, one line for a bad one."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.checkpoint import save_pretrained
from diymodel.cli import main
from diymodel.verify import SubjectError, check_causal_lm
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import replay, verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

COMPLETE, CACHED = "directory.complete", "directory.cached_equals_full"
LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
Weights = dict[str, torch.Tensor]


def save(path: Path, model_type: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A directory as transformers writes it."""
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "llama", "llama", **LLAMA)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tied"
    return save(path, "llama", torch.bfloat16, **LLAMA, tie_word_embeddings=True)


def changed(
    source: Path,
    to: Path,
    weights: Callable[[Weights], Weights] = lambda weights: weights,
    config: Callable[[dict[str, Any]], Any] = lambda config: config,
) -> Path:
    """A copy with other files."""
    shutil.copytree(source, to)
    file, description = to / "model.safetensors", to / "config.json"
    safetensors.save_file(weights(safetensors.load_file(file)), file, {"format": "pt"})
    description.write_text(json.dumps(config(json.loads(description.read_text(encoding="utf-8")))), encoding="utf-8")
    return to


@pytest.mark.usefixtures("few_trials")
@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {**LLAMA, "attention_bias": True, "rms_norm_eps": 1e-3}),
        ("mistral", {**LLAMA, "sliding_window": 4}),
        ("gpt2", {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    ],
)
def test_a_directory_of_transformers_passes(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    path = save(tmp_path / "model", model_type, **fields)
    report = check_causal_lm(str(path), profile="quick", only=["directory.*", "decode.c*", "causality.edit"])
    assert report.verdict == "passed", report.to_text()
    assert {result.check.id for result in report.results if result.status == "passed"} >= {COMPLETE, CACHED}


def test_a_directory_of_ours_passes(tmp_path: Path) -> None:
    config = DIYConfig(vocab_size=32, hidden_size=16, num_heads=4, num_kv_heads=2, tie_word_embeddings=True)
    save_pretrained(DIYForCausalLM(config), tmp_path / "model")
    report = check_causal_lm(str(tmp_path / "model"), profile="quick", only=["directory.*", "decode.c*"])
    assert report.verdict == "passed", report.to_text()


def test_half_precision_weights_are_judged_as_they_are(tied: Path) -> None:
    report = check_causal_lm(str(tied), profile="quick", only=["directory.*"])
    assert report.verdict == "passed", report.to_text()


def test_sizes_are_small_and_all_else_is_as_in_the_directory(tmp_path: Path) -> None:
    rotary = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    fields = {**LLAMA, "hidden_act": "gelu", "rms_norm_eps": 1e-3, "sliding_window": 16, "rope_parameters": rotary}
    subject = resolve(str(save(tmp_path / "model", "mistral", **fields)))
    config = DIYConfig(vocab_size=12, num_layers=1, hidden_size=8, num_heads=2, num_kv_heads=1, max_seq_len=8)
    built = subject.build(config).config
    assert (built.vocab_size, built.num_hidden_layers, built.hidden_size, built.head_dim) == (12, 1, 8, 4)
    assert (built.hidden_act, built.rms_norm_eps) == ("gelu", 1e-3)
    assert built.rope_parameters == rotary
    assert 0 < built.sliding_window < 8  # shorter than a trial's sequences, so that it shows
    assert built.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": lambda w: {name: v for name, v in w.items() if "1.mlp.up_proj" not in name}},
            "model.layers.1.mlp.up_proj.weight missing, and drawn at random instead",
        ),
        (
            {"weights": lambda w: {name.replace("0.input_layernorm", "0.ln_1"): v for name, v in w.items()}},
            "model.layers.0.input_layernorm.weight missing, and drawn at random instead; model.layers.0.ln_1.weight "
            "left over",
        ),
        (
            {"weights": lambda w: {f"_orig_mod.{name}": v for name, v in w.items()}},
            "lm_head.weight missing, .*, and 38 more",
        ),
        (
            {"config": lambda c: {**c, "num_hidden_layers": 1}},
            r"model.layers.1.input_layernorm.weight left over; .*, and 5 more",
        ),
        (
            {"config": lambda c: {**c, "intermediate_size": 20}},
            r"model.layers.0.mlp.down_proj.weight of shape \(16, 24\), where the model has \(16, 20\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_named(
    llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = changed(llama, tmp_path / "model", **change)
    (check,) = select_checks([COMPLETE])
    result = verify_one(resolve(str(path)), check, Settings(PROFILES["quick"], shrink=False))
    assert result.failure is not None
    with pytest.raises(AssertionError, match=f"nothing else, saw {message}"):
        raise AssertionError(result.failure.message)
    again = replay(str(path), result.check, result.failure.values).failure
    assert again is not None
    assert again.message == result.failure.message


def test_a_lost_tie_is_found(tied: Path, tmp_path: Path) -> None:
    path = changed(tied, tmp_path / "model", config=lambda c: {**c, "tie_word_embeddings": False})
    (result,) = check_causal_lm(str(path), profile="quick", only=[COMPLETE]).failed
    assert result.failure is not None
    assert "lm_head.weight missing" in result.failure.message
    assert "tie-lost" in result.failure.likely_causes


def test_a_damaged_file_fails_with_what_its_reader_says(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(llama, path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    report = check_causal_lm(str(path), profile="quick", only=["directory.*"])
    assert [result.check.id for result in report.failed] == [COMPLETE, CACHED]
    failure = report.failed[0].failure
    assert failure is not None
    assert failure.message.startswith("the directory's weights must load, saw SafetensorError: ")


def test_code_in_a_directory_is_not_run(llama: Path, tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    path = changed(llama, tmp_path / "model", config=lambda c: {**c, **own})
    (path / "own.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    with pytest.raises(SubjectError, match=r"of model_type 'own', .*; models that bring their own code are not run"):
        check_causal_lm(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json: expected a directory that save_pretrained wrote"),
        ('{"model_type": ', "config.json is not JSON: Expecting value"),
        ("[1]", "config.json holds a list: expected an object with the model's settings"),
        ("{}", 'config.json has no "model_type"'),
        ('{"model_type": "lama"}', "is of model_type 'lama', which transformers has no causal language model of"),
        ('{"model_type": "llama"}', r"has a config.json and no weights: expected \*.safetensors or \*.bin"),
    ],
)
def test_a_bad_directory_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(SubjectError, match=message):
        resolve(str(tmp_path))
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_that_transformers_refuses_is_said_in_one_line(llama: Path, tmp_path: Path) -> None:
    path = changed(llama, tmp_path / "model", config=lambda c: {**c, "hidden_size": "wide"})
    with pytest.raises(SubjectError, match=r"transformers refuses .*config.json: \w+: .*") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["hf:llama", "{directory}"])
def test_without_transformers_one_line_says_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.auto.modeling_auto", None)
    with pytest.raises(SubjectError, match=r"needs transformers: pip install 'diymodel\[hf\]'"):
        resolve(spec.format(directory=llama))


def test_a_model_that_stays_large_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(SubjectError, match="million parameters where the smallest sizes are asked for"):
        check_causal_lm("hf:gemma3", only=[COMPLETE])
