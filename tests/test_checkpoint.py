"""Both forms of a checkpoint: exact round trips, seals, strictness, refusals, and transformers on the other side."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel import (
    DIYConfig,
    DIYForCausalLM,
    load_checkpoint,
    load_pretrained,
    save_checkpoint,
    save_pretrained,
)
from diymodel._files import create_directory
from diymodel.checkpoint import read_checkpoint
from diymodel.hf_form import config_to_hf, weights_to_hf

safetensors_torch = pytest.importorskip("safetensors.torch")

SMALL = DIYConfig(
    vocab_size=11,
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    max_seq_len=16,
    num_kv_heads=2,
    intermediate_size=24,
    rms_norm_eps=1e-2,
    rope_theta=100.0,
)
TINY = DIYConfig(vocab_size=3, num_layers=1, hidden_size=2, num_heads=1, max_seq_len=4, intermediate_size=2)

# Every field, with a value that SMALL does not have.
CHANGED: dict[str, Any] = {
    "vocab_size": 12,
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "max_seq_len": 32,
    "dropout": 0.25,
    "num_kv_heads": 4,
    "intermediate_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
CHANGES_SHAPES = ["vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size"]

Save = Callable[[Path, nn.Module], object]
Load = Callable[..., DIYForCausalLM]
FORMS: list[Any] = [
    pytest.param(save_checkpoint, load_checkpoint, id="file"),
    pytest.param(lambda path, model: save_pretrained(model, path), load_pretrained, id="directory"),
]
both_forms = pytest.mark.parametrize(("save", "load"), FORMS)


def make_model(config: DIYConfig = SMALL, seed: int = 0, dtype: torch.dtype = torch.float32) -> DIYForCausalLM:
    """A model with sharp weights, so that a wrong epsilon, theta or head order shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = DIYForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 2 / weight.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def tokens(config: DIYConfig) -> Tensor:
    return torch.arange(2 * config.max_seq_len).view(2, -1) * 7 % config.vocab_size


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids)
    return output if isinstance(output, Tensor) else output.logits


def as_bits(weight: Tensor) -> bytes:
    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    """Bit for bit, dtypes and names included."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert weight.dtype == right[name].dtype, name
        assert weight.shape == right[name].shape, name
        assert as_bits(weight) == as_bits(right[name]), name


def write_by_hand(path: Path, model: DIYForCausalLM, **changes: Any) -> Path:
    """The learner's own file: no format, no seal."""
    torch.save({"config": model.config.to_dict(), "state_dict": model.state_dict(), **changes}, path)
    return path


def foreign_directory(
    path: Path, model: DIYForCausalLM, weights: dict[str, Tensor] | None = None, **changes: Any
) -> Path:
    """A directory in Hugging Face form that somebody else wrote: no marker, no seal."""
    path.mkdir()
    config = {**config_to_hf(model.config, torch.float32), **changes}
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    if weights is None:
        weights = weights_to_hf(model.state_dict(), model.config)
    safetensors_torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


# --- round trips -----------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> DIYConfig:
    kv_heads, groups, pairs = (draw(st.integers(1, 2)) for _ in range(3))
    vocab_size = draw(st.integers(1, 20))
    return DIYConfig(
        vocab_size=vocab_size,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=kv_heads * groups * pairs * 2,
        num_heads=kv_heads * groups,
        max_seq_len=draw(st.integers(1, 40)),
        dropout=draw(st.sampled_from([0.0, 0.1, 1 / 3])),
        num_kv_heads=kv_heads,
        intermediate_size=draw(st.integers(1, 9)),
        rms_norm_eps=draw(st.floats(1e-8, 1e-1)),
        rope_theta=draw(st.floats(2.0, 1e7)),
        tie_word_embeddings=draw(st.booleans()),
        pad_token_id=draw(st.none() | st.integers(0, vocab_size - 1)),
    )


@both_forms
@settings(max_examples=25)
@given(
    config=configs(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory, save: Save, load: Load, config: DIYConfig, seed: int, dtype: torch.dtype
) -> None:
    model = make_model(config, seed, dtype)
    path = tmp_path_factory.mktemp("round-trip") / "model"
    save(path, model)
    loaded = load(path, expected=config)
    assert loaded.config == config
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == config.tie_word_embeddings
    assert torch.equal(logits(loaded, tokens(config)), logits(model, tokens(config)))
    assert all(weight.requires_grad for weight in loaded.parameters())


@both_forms
def test_saving_and_loading_touch_neither_the_model_nor_the_random_state(
    tmp_path: Path, save: Save, load: Load
) -> None:
    model = make_model().train()
    before = {name: (weight.data_ptr(), as_bits(weight)) for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    save(tmp_path / "model", model)
    load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert {name: (weight.data_ptr(), as_bits(weight)) for name, weight in model.state_dict().items()} == before


@both_forms
def test_large_weights_keep_their_order_in_memory(tmp_path: Path, save: Save, load: Load) -> None:
    model = DIYForCausalLM(DIYConfig(vocab_size=2048, num_layers=1, hidden_size=128, num_heads=4)).eval()
    assert not model.lm_head.weight.is_contiguous()
    save(tmp_path / "model", model)
    loaded = load(tmp_path / "model")
    assert_same_weights(loaded, model)
    assert loaded.lm_head.weight.stride() == model.lm_head.weight.stride()


@both_forms
def test_weights_that_are_not_finite_are_kept(tmp_path: Path, save: Save, load: Load) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    save(tmp_path / "model", model)
    assert_same_weights(load(tmp_path / "model"), model)


def test_a_tied_weight_that_is_not_finite_is_still_tied(tmp_path: Path) -> None:
    """NaN is unequal to itself, which must not make one weight look like two."""
    model = make_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    save_checkpoint(tmp_path / "m.pt", model)
    state_dict = read_checkpoint(tmp_path / "m.pt").state_dict
    assert as_bits(state_dict["lm_head.weight"]) == as_bits(model.lm_head.weight)


@both_forms
def test_a_compiled_model_is_unwrapped(tmp_path: Path, save: Save, load: Load) -> None:
    model = make_model()
    save(tmp_path / "whole", torch.compile(model, backend="eager"))
    assert_same_weights(load(tmp_path / "whole"), model)
    blocks = make_model()
    blocks.model.layers[0] = torch.compile(blocks.model.layers[0], backend="eager")
    save(tmp_path / "blocks", blocks)
    assert_same_weights(load(tmp_path / "blocks"), model)


@both_forms
def test_the_model_is_loaded_to_a_device(tmp_path: Path, save: Save, load: Load) -> None:
    """To another than the CPU in test_gpu.py."""
    model = make_model()
    save(tmp_path / "model", model)
    assert_same_weights(load(tmp_path / "model", device=torch.device("cpu")), model)


@pytest.mark.parametrize("device", ["meta", "nonsense"])
@both_forms
def test_a_device_that_cannot_be_used_is_refused_before_anything_is_read(
    tmp_path: Path, save: Save, load: Load, device: str
) -> None:
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used: "):
        load(tmp_path / "nothing", device=device)
    save_checkpoint(tmp_path / "m.pt", make_model())
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used: "):
        read_checkpoint(tmp_path / "m.pt").model(device)


@both_forms
def test_only_our_model_can_be_saved(tmp_path: Path, save: Save, load: Load) -> None:
    with pytest.raises(TypeError, match="a DIYForCausalLM can be saved, not a Linear"):
        save(tmp_path / "model", nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


@both_forms
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, save: Save, load: Load) -> None:
    mixed = make_model()
    mixed.lm_head.double()
    with pytest.raises(ValueError, match="one floating-point dtype"):
        save(tmp_path / "model", mixed)
    with pytest.raises(ValueError, match="on the meta device"):
        save(tmp_path / "model", make_model().to("meta"))
    altered = make_model()
    altered.lm_head = nn.Linear(16, 12, bias=True)
    with pytest.raises(ValueError, match=r"(?s)unexpected: lm_head.bias.*lm_head.weight is \(12, 16\)"):
        save(tmp_path / "model", altered)
    assert not list(tmp_path.iterdir())


# --- the single file -------------------------------------------------------------------------------------------------


def test_a_stranger_reads_the_file_with_torch_load(tmp_path: Path) -> None:
    """The seal is a proper ZIP comment, and tied weights are stored once."""
    model = make_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    save_checkpoint(tmp_path / "m.pt", model)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert content.keys() == {"format", "config", "state_dict"}
    assert content["config"] == model.config.to_dict()
    embedding, head = (content["state_dict"][name] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    assert embedding.data_ptr() == head.data_ptr()
    torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None
        assert re.fullmatch(rb"diymodel sha256 [0-9a-f]{64}", archive.comment)


def test_training_state_comes_back(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens(SMALL)).sum().backward()
    optimizer.step()
    training = {"step": 3, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "loss": [1.5, None]}
    save_checkpoint(tmp_path / "m.pt", model, training)
    checkpoint = read_checkpoint(tmp_path / "m.pt")
    assert checkpoint.config == SMALL
    assert checkpoint.training is not None
    assert (checkpoint.training["step"], checkpoint.training["loss"]) == (3, [1.5, None])
    assert torch.equal(checkpoint.training["rng"], training["rng"])
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(checkpoint.training["optimizer"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    save_checkpoint(tmp_path / "m.pt", model)
    assert read_checkpoint(tmp_path / "m.pt").training is None


def test_training_state_that_could_not_be_read_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training holds pathlib\..*, which only code can restore"):
        save_checkpoint(tmp_path / "m.pt", make_model(), {"data": Path("text")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_written_by_hand_loads(tmp_path: Path, tied: bool) -> None:
    model = make_model(dataclasses.replace(SMALL, tie_word_embeddings=tied))
    assert_same_weights(load_checkpoint(write_by_hand(tmp_path / "m.pt", model), model.config), model)


def test_a_tied_file_by_hand_may_hold_the_weight_once(tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(SMALL, tie_word_embeddings=True))
    state_dict = model.state_dict()
    del state_dict["lm_head.weight"]
    loaded = load_checkpoint(write_by_hand(tmp_path / "m.pt", model, state_dict=state_dict))
    assert_same_weights(loaded, model)
    assert read_checkpoint(tmp_path / "m.pt").state_dict.keys() == model.state_dict().keys()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_wrapper_prefix_on_every_name_is_taken_off(tmp_path: Path, prefix: str) -> None:
    model = make_model()
    state_dict = {prefix + name: weight for name, weight in model.state_dict().items()}
    assert_same_weights(load_checkpoint(write_by_hand(tmp_path / "m.pt", model, state_dict=state_dict)), model)
    state_dict["model.norm.weight"] = state_dict.pop(f"{prefix}model.norm.weight")
    with pytest.raises(ValueError, match=f"unexpected: {prefix}lm_head.weight|… and "):
        load_checkpoint(write_by_hand(tmp_path / "m.pt", model, state_dict=state_dict))


# --- seals -----------------------------------------------------------------------------------------------------------


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_to_flip(size: int, all_of: range) -> list[int]:
    """Every bit of the bytes ``all_of``, and 400 others."""
    others = [random.Random(0).randrange(8 * size) for _ in range(400)]
    return [8 * byte + bit for byte in all_of for bit in range(8)] + others


def unnoticed(path: Path, contents: list[bytes], load: Callable[[], object]) -> list[str]:
    """What was wrong with the way these contents of the file at ``path`` were refused; it is put back afterwards."""
    original = path.read_bytes()
    wrong = []
    for number, content in enumerate(contents):
        path.write_bytes(content)
        try:
            load()
            wrong.append(f"content {number} was loaded")
        except ValueError as error:
            if "weights_only" in str(error):
                wrong.append(f"content {number}: {error}")
    path.write_bytes(original)
    load()
    return wrong


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, make_model(TINY))
    content = path.read_bytes()
    bits = bits_to_flip(len(content), range(len(content) - 600, len(content)))
    assert unnoticed(path, [flipped(content, bit) for bit in bits], lambda: load_checkpoint(path)) == []


def test_every_truncation_and_addition_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, make_model(TINY))
    content = path.read_bytes()
    lengths = [*range(0, len(content), 40), *range(len(content) - 200, len(content))]
    changed = [content[:length] for length in lengths] + [content + b"\0", content + content]
    assert unnoticed(path, changed, lambda: load_checkpoint(path)) == []


def test_every_flipped_bit_of_a_directory_is_noticed(tmp_path: Path) -> None:
    save_pretrained(make_model(TINY), tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / "m" / name
        content = path.read_bytes()
        bits = bits_to_flip(len(content), range(min(400, len(content))))
        assert unnoticed(path, [flipped(content, bit) for bit in bits], lambda: load_pretrained(tmp_path / "m")) == []


def test_every_truncation_and_addition_in_a_directory_is_noticed(tmp_path: Path) -> None:
    save_pretrained(make_model(TINY), tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / "m" / name
        content = path.read_bytes()
        changed = [content[:length] for length in range(0, len(content), 3)] + [content + b"\n", content + content]
        assert unnoticed(path, changed, lambda: load_pretrained(tmp_path / "m")) == []


def test_the_seal_is_checked_before_anything_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, make_model(TINY))
    path.write_bytes(flipped(path.read_bytes(), 8 * 100))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    message = f"{path}: the file is damaged: its contents do not match its sha256 .* restore it from a copy"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_a_file_of_ours_without_its_seal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, make_model(TINY))
    content = torch.load(path, weights_only=True)
    torch.save(content, path)
    with pytest.raises(ValueError, match="has lost its sha256 seal"):
        load_checkpoint(path)


def test_an_edited_configuration_of_ours_is_refused(tmp_path: Path) -> None:
    """The edit fits every shape: only the seal can notice it."""
    save_pretrained(make_model(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 100.0', '"rope_theta": 500.0'))
    with pytest.raises(ValueError, match="the directory is damaged: its contents do not match its sha256"):
        load_pretrained(tmp_path / "m")


def test_weights_of_ours_without_their_seal_are_refused(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "m")
    weights = safetensors_torch.load_file(tmp_path / "m" / "model.safetensors")
    safetensors_torch.save_file(weights, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors has lost its sha256 seal"):
        load_pretrained(tmp_path / "m")


@both_forms
def test_a_later_format_is_refused(tmp_path: Path, save: Save, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("diymodel.checkpoint.FORMAT", 2)
        save(tmp_path / "m", make_model(TINY))
    with pytest.raises(ValueError, match="has format 2, and this version of diymodel reads 1"):
        load(tmp_path / "m")


# --- strictness ------------------------------------------------------------------------------------------------------


def test_the_table_of_changes_has_every_field() -> None:
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(DIYConfig)}


@both_forms
@pytest.mark.parametrize("field", CHANGED)
def test_another_expected_configuration_is_refused(tmp_path: Path, save: Save, load: Load, field: str) -> None:
    save(tmp_path / "m", make_model())
    expected = dataclasses.replace(SMALL, **{field: CHANGED[field]})
    message = f"{field}={getattr(SMALL, field)!r}, expected {CHANGED[field]!r}"
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'm'}: saved with another configuration: {message}")):
        load(tmp_path / "m", expected=expected)


@pytest.mark.parametrize("field", CHANGES_SHAPES)
def test_weights_of_another_shape_are_refused_with_the_field(tmp_path: Path, field: str) -> None:
    model = make_model()
    other = dataclasses.replace(SMALL, **{field: CHANGED[field]})
    with pytest.raises(ValueError, match=rf"(?s)m.pt: the weights do not fit the configuration:.*\(.*{field}.*\)"):
        load_checkpoint(write_by_hand(tmp_path / "m.pt", model, config=other.to_dict()))
    directory = foreign_directory(tmp_path / "m", model, **config_to_hf(other, torch.float32))
    with pytest.raises(ValueError, match=rf"(?s)m: the weights do not fit the configuration:.*\(.*{field}.*\)"):
        load_pretrained(directory)


BAD_WEIGHTS: list[Any] = [
    (lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
    (lambda w: w.pop("lm_head.weight"), "missing: lm_head.weight (tie_word_embeddings=False)"),
    (lambda w: w.update(more=torch.ones(1)), "unexpected: more"),
    (
        lambda w: w.update({"model.layers.2.mlp.down_proj.weight": torch.ones(1)}),
        "unexpected: model.layers.2.mlp.down_proj.weight (num_layers=2)",
    ),
    (
        lambda w: [w.pop(name) for name in list(w) if name.startswith("model.layers.1.")],
        "missing: model.layers.1.input_layernorm.weight (num_layers=2)",
    ),
    (
        lambda w: w.update({"model.norm.weight": torch.ones(8)}),
        "shape: model.norm.weight is (8,), and must be (16,) (hidden_size)",
    ),
    (
        lambda w: w.update({"model.embed_tokens.weight": torch.ones(12, 16)}),
        "shape: model.embed_tokens.weight is (12, 16), and must be (11, 16) (vocab_size)",
    ),
    (
        lambda w: w.update({"model.layers.0.mlp.down_proj.weight": torch.ones(16, 25)}),
        "shape: model.layers.0.mlp.down_proj.weight is (16, 25), and must be (16, 24) (intermediate_size)",
    ),
    (
        lambda w: w.update({"model.layers.0.self_attn.o_proj.weight": torch.ones(16)}),
        "shape: model.layers.0.self_attn.o_proj.weight is (16,), and must be (16, 16) (hidden_size)",
    ),
    (lambda w: w.update({"model.norm.weight": torch.ones(16).double()}), "these are 18 torch.float32, 1 torch.float64"),
    (
        lambda w: w.update({name: weight.to(torch.int64) for name, weight in w.items()}),
        "one floating-point dtype; these are 19 torch.int64",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS)
def test_bad_weights_are_refused_by_name(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    model = make_model()
    state_dict = dict(model.state_dict())
    change(state_dict)
    with pytest.raises(ValueError, match=re.escape(message.replace("18 ", "14 ").replace("19 ", "15 "))):
        load_checkpoint(write_by_hand(tmp_path / "m.pt", model, state_dict=state_dict))
    weights = weights_to_hf(model.state_dict(), SMALL)
    change(weights)
    hf_message = message.replace("18 ", "20 ").replace("19 ", "21 ")
    with pytest.raises(ValueError, match=re.escape(hf_message)):
        load_pretrained(foreign_directory(tmp_path / "m", model, weights))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_missing_projection_is_named_as_hugging_face_does(tmp_path: Path, part: str) -> None:
    model = make_model()
    weights = weights_to_hf(model.state_dict(), SMALL)
    name = f"model.layers.0.self_attn.{part}_proj.weight"
    del weights[name]
    with pytest.raises(ValueError, match=f"missing: {name}$"):
        load_pretrained(foreign_directory(tmp_path / "m", model, weights))


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)do not fit the configuration:(\n  [^\n]+){12}\n  … and 3 more$"):
        load_checkpoint(write_by_hand(tmp_path / "m.pt", make_model(), state_dict={}))


def test_tied_weights_that_differ_are_refused(tmp_path: Path) -> None:
    model = make_model()  # untied
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    message = "lm_head.weight is not model.embed_tokens.weight.* has tie_word_embeddings=True"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(write_by_hand(tmp_path / "m.pt", model, config=tied.to_dict()))
    with pytest.raises(ValueError, match=message):
        load_pretrained(foreign_directory(tmp_path / "m", model, tie_word_embeddings=True))


# --- what is no checkpoint -------------------------------------------------------------------------------------------


@both_forms
def test_a_missing_path_is_named(tmp_path: Path, save: Save, load: Load) -> None:
    with pytest.raises(FileNotFoundError, match=f"there is no .* {tmp_path / 'nothing'}"):
        load(tmp_path / "nothing")


class RunsCode:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("key", ["config", "state_dict", "training", "more"])
def test_a_file_with_code_is_refused_and_does_not_run(tmp_path: Path, key: str) -> None:
    write_by_hand(tmp_path / "m.pt", make_model(), **{key: RunsCode(tmp_path / "trace")})
    with pytest.raises(ValueError, match=r"m\.pt: refused: it contains code \(posix\.mkdir\)") as caught:
        load_checkpoint(tmp_path / "m.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_a_bare_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.dumps(RunsCode(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"is no checkpoint: not a file that torch\.save wrote"):
        load_checkpoint(tmp_path / "m.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"some text", b"PK\x03\x04 and then nothing"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"m\.pt: (is no checkpoint: not a file that torch\.save wrote|is damaged, or)"
    ):
        load_checkpoint(tmp_path / "m.pt")


def test_the_other_form_is_recognised(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "file", make_model())
    save_pretrained(make_model(), tmp_path / "directory")
    with pytest.raises(ValueError, match="is a directory: load_pretrained reads the Hugging Face form"):
        load_checkpoint(tmp_path / "directory")
    with pytest.raises(ValueError, match="is a file: load_checkpoint reads the single-file form"):
        load_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lm_head.weight": torch.ones(1)}, 'is no checkpoint: that is a dict with at least "config" and "state_dict"'),
        (torch.ones(1), "is no checkpoint"),
        ({"config": 1, "state_dict": {}}, '"config" must be a dict, and is a int'),
        ({"config": {}, "state_dict": []}, '"state_dict" must be a dict, and is a list'),
        ({"config": {}, "state_dict": {}, "training": 3}, '"training" must be a dict, and is a int'),
        ({"config": {}, "state_dict": {"a": 1}}, "\"state_dict\" must map names to tensors, and has 'a': int"),
        ({"config": {"num_layer": 1}, "state_dict": {}}, "no field 'num_layer'; the nearest is 'num_layers'"),
        ({"config": {"num_heads": 3}, "state_dict": {}}, "not divisible by num_heads=3"),
        ({"config": {"num_heads": "3"}, "state_dict": {}}, "num_heads='3': expected int"),
    ],
)
def test_a_file_with_the_wrong_content_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt: .*" + re.escape(message)):
        load_checkpoint(tmp_path / "m.pt")


# --- the directory ---------------------------------------------------------------------------------------------------


def test_a_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with safetensors_torch.safe_open(tmp_path / "a" / "b" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 (it is no mapping)


def test_the_same_configuration_is_saved_over(tmp_path: Path) -> None:
    first, second = make_model(seed=1), make_model(seed=2)
    save_pretrained(first, tmp_path / "m")
    config = (tmp_path / "m" / "config.json").stat()
    save_pretrained(second, tmp_path / "m")
    assert (tmp_path / "m" / "config.json").stat().st_ino == config.st_ino, "only the weights are replaced"
    assert_same_weights(load_pretrained(tmp_path / "m"), second)


def test_a_directory_with_other_files_is_filled(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    save_pretrained(make_model(), tmp_path)
    assert_same_weights(load_pretrained(tmp_path), make_model())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("other", "dtype", "difference"),
    [
        (dataclasses.replace(SMALL, rope_theta=500.0), torch.float32, "rope_theta is 100.0 there and 500.0 here"),
        (dataclasses.replace(SMALL, num_layers=1), torch.float32, "num_hidden_layers is 2 there and 1 here"),
        (SMALL, torch.bfloat16, "torch_dtype is 'float32' there and 'bfloat16' here"),
    ],
)
def test_another_configuration_is_not_saved_over(
    tmp_path: Path, other: DIYConfig, dtype: torch.dtype, difference: str
) -> None:
    save_pretrained(make_model(), tmp_path / "m")
    with pytest.raises(ValueError, match=re.escape(f"holds another model ({difference}): choose another directory")):
        save_pretrained(make_model(other, dtype=dtype), tmp_path / "m")
    assert_same_weights(load_pretrained(tmp_path / "m"), make_model())


def test_a_foreign_directory_is_not_saved_over(tmp_path: Path) -> None:
    foreign_directory(tmp_path / "m", make_model())
    with pytest.raises(ValueError, match="diymodel_format is 'absent' there and 1 here"):
        save_pretrained(make_model(), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged: it is not JSON"):
        save_pretrained(make_model(), tmp_path / "m")


def test_a_configuration_laid_out_in_another_way_is_not_saved_over(tmp_path: Path) -> None:
    """Its seal is of the bytes: with the weights replaced, the directory would be refused."""
    save_pretrained(make_model(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    with pytest.raises(ValueError, match=r"holds another model \(config\.json is laid out in another way\)"):
        save_pretrained(make_model(), tmp_path / "m")


def test_another_writer_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory appears between the look and the rename."""
    first, second = make_model(seed=1), make_model(seed=2)

    def overtaken(directory: Path, files: dict[str, bytes]) -> None:
        monkeypatch.undo()
        save_pretrained(first, directory)
        create_directory(directory, files)

    monkeypatch.setattr("diymodel.checkpoint.create_directory", overtaken)
    save_pretrained(second, tmp_path / "m")
    assert_same_weights(load_pretrained(tmp_path / "m"), second)


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.delitem(sys.modules, "safetensors")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diymodel\[hf\]'"):
        save_pretrained(make_model(), tmp_path / "m")


def test_every_field_travels_through_a_foreign_configuration(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, dropout=0.25, pad_token_id=3)
    assert load_pretrained(foreign_directory(tmp_path / "m", make_model(config))).config == config


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"diymodel_dropout": "absent"}, "dropout", 0.0),
        ({"pad_token_id": -1}, "pad_token_id", None),
        ({"rope_theta": 50}, "rope_theta", 50.0),
        ({"rope_theta": "absent"}, "rope_theta", 10000.0),
        ({"rope_theta": "absent", "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_theta", 7.0),
        ({"rope_scaling": None}, "rope_theta", 100.0),
        ({"max_position_embeddings": "absent"}, "max_seq_len", 2048),
        ({"model_type": "mistral", "sliding_window": None}, "max_seq_len", 16),
        ({"model_type": "mistral", "sliding_window": 16}, "max_seq_len", 16),
        ({"head_dim": None}, "hidden_size", 16),
    ],
)
def test_configurations_that_mean_the_same_elsewhere(
    tmp_path: Path, changes: dict[str, Any], field: str, value: Any
) -> None:
    loaded = load_pretrained(foreign_directory(tmp_path / "m", make_model(), **changes))
    assert getattr(loaded.config, field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not a model that DIYForCausalLM can be"),
        ({"model_type": "absent"}, "model_type=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 8}, "head_dim=8 is not a model that DIYForCausalLM can be: only hidden_size / num_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear', 'factor': 2.0}"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters={'rope_type': 'llama3'}"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "twice: rope_theta=100.0, rope_parameters.rope_theta=7.0"),
        ({"model_type": "mistral", "sliding_window": 15}, "sliding_window=15"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window=4096"),
        ({"hidden_size": "absent"}, "the field 'hidden_size' is missing"),
        ({"pad_token_id": 11}, "DIYConfig.pad_token_id=11"),
        ({"num_hidden_layers": 2.5}, "DIYConfig.num_layers=2.5: expected int"),
    ],
)
def test_configurations_that_are_another_architecture_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'm'}: .*" + re.escape(message)):
        load_pretrained(foreign_directory(tmp_path / "m", make_model(), **changes))


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    foreign_directory(tmp_path / "m", make_model())
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor .*; weights in other formats \(\*\.bin"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is no directory in Hugging Face form: it has no config\.json"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"a": "\\ud8"}', "not JSON")],
)
def test_a_broken_config_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    foreign_directory(tmp_path / "m", make_model())
    (tmp_path / "m" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json is .*{message}"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\0\0\0\0\0\0\0{      }more"])
def test_broken_foreign_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    foreign_directory(tmp_path / "m", make_model())
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_pretrained(tmp_path / "m")


def shard(path: Path, names: list[str]) -> None:
    """Turn the weights of a foreign directory into two files with an index that maps to ``names``."""
    weights = safetensors_torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[:7]), dict(list(weights.items())[7:])]
    for name, part in zip(["one.safetensors", "two.safetensors"], parts, strict=True):
        safetensors_torch.save_file(part, path / name, {"format": "pt"})
    weight_map = {weight: name for name, part in zip(names, parts, strict=True) for weight in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_weights_in_several_files(tmp_path: Path) -> None:
    model = make_model()
    shard(foreign_directory(tmp_path / "m", model), ["one.safetensors", "two.safetensors"])
    assert_same_weights(load_pretrained(tmp_path / "m"), model)
    # the same weights in both
    (tmp_path / "m" / "two.safetensors").write_bytes((tmp_path / "m" / "one.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"is in two\.safetensors and in an earlier file"):
        load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["three.safetensors", "../outside.safetensors"])
def test_an_index_reaches_only_files_of_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"")
    shard(foreign_directory(tmp_path / "m", make_model()), ["one.safetensors", name])
    with pytest.raises(
        ValueError, match=f"index.json names '{re.escape(name)}', which is not a file of this directory"
    ):
        load_pretrained(tmp_path / "m")


def test_rotary_frequencies_of_early_files_are_left_out(tmp_path: Path) -> None:
    model = make_model()
    weights = weights_to_hf(model.state_dict(), SMALL)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    assert_same_weights(load_pretrained(foreign_directory(tmp_path / "m", model, weights)), model)


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_transformers_opens_ours(tmp_path: Path, transformers: Any, tied: bool, kv_heads: int) -> None:
    config = dataclasses.replace(SMALL, tie_word_embeddings=tied, num_kv_heads=kv_heads, pad_token_id=3)
    model = make_model(config)
    save_pretrained(model, tmp_path / "m")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(theirs.eval(), tokens(config)), logits(model, tokens(config)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_transformers_keeps_the_dtype(tmp_path: Path, transformers: Any, dtype: torch.dtype) -> None:
    save_pretrained(make_model(dtype=dtype), tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert theirs.dtype == dtype
    assert as_bits(theirs.lm_head.weight) == as_bits(make_model(dtype=dtype).lm_head.weight)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_we_open_theirs(
    tmp_path: Path, transformers: Any, model_type: str, tied: bool, kv_heads: int, shard_size: str
) -> None:
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=SMALL.vocab_size,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.mlp_size,
        num_hidden_layers=SMALL.num_layers,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=SMALL.max_seq_len,
        rms_norm_eps=SMALL.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": SMALL.rope_theta},
        tie_word_embeddings=tied,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=2 / weight.shape[-1] ** 0.5)
    theirs.save_pretrained(tmp_path / "m", max_shard_size=shard_size)
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_size == "4KB")
    expected = dataclasses.replace(SMALL, dropout=0.0, num_kv_heads=kv_heads, tie_word_embeddings=tied)
    ours = load_pretrained(tmp_path / "m", expected=expected)
    torch.testing.assert_close(logits(ours, tokens(SMALL)), logits(theirs, tokens(SMALL)), atol=1e-5, rtol=0)


def test_ours_saved_again_by_transformers_opens(tmp_path: Path, transformers: Any) -> None:
    """It carries our marker along without our seal, and says by its own version that it wrote the files."""
    config = dataclasses.replace(SMALL, dropout=0.25)
    save_pretrained(make_model(config), tmp_path / "ours")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_weights(load_pretrained(tmp_path / "theirs", expected=config), make_model(config))
