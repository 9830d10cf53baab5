"""A resumed run equals an uninterrupted one bit for bit, wherever it stopped, and refuses to become another run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel.checkpoint import read_checkpoint, save_checkpoint
from diymodel.config import DIYConfig, TrainConfig
from diymodel.devices import choose_device
from diymodel.model import DIYForCausalLM
from diymodel.tokenizer import ByteTokenizer, JsonTokenizer
from diymodel.train import TrainResult, train

STEPS = 6
MODEL = DIYConfig(vocab_size=258, num_layers=2, hidden_size=16, num_heads=2, max_seq_len=12, dropout=0.3)
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=3,
    grad_accumulation=2,
    warmup_steps=2,
    eval_every=2,
    save_every=100,
    log_every=1,
    device="cpu",
    dtype="float32",
)
DOCUMENTS = [f"Document {i} says: {'hello ' * (i % 4)}" for i in range(20)]


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """A shell may have started the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(out: Path, config: TrainConfig = TRAIN, stop_at: int | None = None, **settings: Any) -> TrainResult:
    """Train; with ``stop_at``, Ctrl-C is pressed during that step."""

    def log(line: str) -> None:
        if line.startswith(f"step {stop_at}/") and "loss" in line:
            signal.raise_signal(signal.SIGINT)

    model_config = settings.pop("model_config", MODEL)
    return train(model_config, config, settings.pop("documents", DOCUMENTS), out, log=log, **settings)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def state(out: Path) -> dict[str, Any]:
    """All there is in the checkpoint: weights, optimizer, random states and step, by name."""
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    return {"weights": checkpoint.state_dict, "training": checkpoint.training}


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    """Bit for bit, into every container."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module", params=["packed", "padded"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A configuration and the directory of its run from start to end."""
    config = dataclasses.replace(TRAIN, batching=request.param)
    out = tmp_path_factory.mktemp("uninterrupted") / request.param
    train(MODEL, config, DOCUMENTS, out, log=lambda line: None)
    return config, out


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_stopped_at_any_step_it_continues_bit_for_bit(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path, stop_at: int
) -> None:
    config, reference = uninterrupted
    stopped = run(tmp_path, config, stop_at)
    assert (stopped.interrupted, stopped.step, stopped.evaluation) == (True, stop_at, None)
    torch.manual_seed(stop_at)  # another process would not have this one's random state either
    finished = run(tmp_path, config, resume=True)
    assert (finished.interrupted, finished.step) == (False, STEPS)
    assert metrics(tmp_path) == metrics(reference)
    assert_equal(state(tmp_path), state(reference))


def test_stopped_after_every_step_it_continues_bit_for_bit(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config, reference = uninterrupted
    for step in range(1, STEPS + 1):
        run(tmp_path, config, stop_at=step, resume=step > 1)
    assert metrics(tmp_path) == metrics(reference)
    assert_equal(state(tmp_path), state(reference))


def test_these_tests_notice_lost_random_state(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, reference = uninterrupted
    run(tmp_path, config, stop_at=3)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    run(tmp_path, config, resume=True)
    assert metrics(tmp_path)[:3] == metrics(reference)[:3]
    assert metrics(tmp_path) != metrics(reference)


@pytest.mark.parametrize(
    ("model_config", "config"),
    [
        pytest.param(MODEL, dataclasses.replace(TRAIN, dtype="bfloat16"), id="bfloat16"),
        pytest.param(dataclasses.replace(MODEL, tie_word_embeddings=True), TRAIN, id="tied"),
        pytest.param(
            # From 2**18 elements on, a weight lies in memory column by column, and so must its optimizer state.
            dataclasses.replace(MODEL, num_layers=1, hidden_size=320, intermediate_size=8),
            dataclasses.replace(TRAIN, steps=3),
            id="column-stored",
        ),
    ],
)
def test_other_models_continue_bit_for_bit(tmp_path: Path, model_config: DIYConfig, config: TrainConfig) -> None:
    run(tmp_path / "reference", config, model_config=model_config)
    run(tmp_path / "stopped", config, stop_at=2, model_config=model_config)
    run(tmp_path / "stopped", config, model_config=model_config, resume=True)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "reference")
    assert_equal(state(tmp_path / "stopped"), state(tmp_path / "reference"))


def test_after_a_crash_the_metrics_of_lost_steps_are_dropped(
    uninterrupted: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(uninterrupted[0], save_every=2)

    def crash(line: str) -> None:
        if line.startswith("step 5/"):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(MODEL, config, DOCUMENTS, tmp_path, log=crash)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a line torn in the middle
    assert state(tmp_path)["training"]["step"] == 4
    run(tmp_path, config, resume=True)
    assert metrics(tmp_path) == metrics(uninterrupted[1])
    assert_equal(state(tmp_path)["weights"], state(uninterrupted[1])["weights"])


def test_a_run_that_crashed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 99.0}\n')
    run(tmp_path)
    assert metrics(tmp_path)[0]["loss"] < 10


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    finished = run(tmp_path)
    before = (metrics(tmp_path), (tmp_path / "checkpoint.pt").read_bytes())
    again = run(tmp_path, resume=True)
    assert (metrics(tmp_path), (tmp_path / "checkpoint.pt").read_bytes()) == before
    assert (again.step, again.evaluation) == (STEPS, finished.evaluation)


def test_ctrl_c_during_the_last_step_finishes_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, stop_at=STEPS)
    assert (result.interrupted, result.step) == (False, STEPS)


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back(tmp_path: Path) -> None:
    def impatient(line: str) -> None:
        if line.startswith("step 2/"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(MODEL, TRAIN, DOCUMENTS, tmp_path, log=impatient)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 2."""
    out: Path = tmp_path_factory.mktemp("stopped")
    run(out, stop_at=2)
    return out


REFUSED: dict[str, Any] = {
    "steps": 7,
    "batch_size": 4,
    "grad_accumulation": 1,
    "learning_rate": 0.5,
    "min_lr_ratio": 0.5,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "beta1": 0.5,
    "beta2": 0.5,
    "grad_clip": 2.0,
    "batching": "padded",
    "seed": 1,
    "dtype": "bfloat16",
}
FREE: dict[str, Any] = {"eval_every": 3, "eval_batches": 1, "save_every": 1, "log_every": 2, "device": "auto"}


def test_every_setting_is_refused_or_free() -> None:
    assert sorted([*REFUSED, *FREE]) == sorted(field.name for field in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_change_the_trajectory_are_refused(stopped: Path, field: str) -> None:
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    was, now = re.escape(repr(getattr(TRAIN, field))), re.escape(repr(REFUSED[field]))
    with pytest.raises(ValueError, match=rf"^cannot resume .*checkpoint\.pt: \S*{field} was {was} and is {now} now$"):
        run(stopped, dataclasses.replace(TRAIN, **{field: REFUSED[field]}), resume=True)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.skipif(choose_device("auto").type != "cpu", reason="auto is another device than the run's")
def test_other_settings_may_change(stopped: Path, tmp_path: Path) -> None:
    run(tmp_path / "reference")
    shutil.copytree(stopped, tmp_path / "copy")
    run(tmp_path / "copy", dataclasses.replace(TRAIN, **FREE), resume=True)
    assert_equal(state(tmp_path / "copy")["weights"], state(tmp_path / "reference")["weights"])


def test_another_model_data_or_tokenizer_is_refused(stopped: Path) -> None:
    with pytest.raises(ValueError, match=r"DIYConfig\.dropout was 0\.3 and is 0\.0 now"):
        run(stopped, model_config=dataclasses.replace(MODEL, dropout=0.0), resume=True)
    with pytest.raises(ValueError, match=r"data was '20 documents, \S+ characters, hash \w+' and is '19 documents"):
        run(stopped, documents=DOCUMENTS[1:], resume=True)
    with pytest.raises(ValueError, match="data was"):
        run(stopped, documents=[DOCUMENTS[0].upper(), *DOCUMENTS[1:]], resume=True)

    class OtherTokenizer(ByteTokenizer):
        def to_dict(self) -> dict[str, str]:
            return {"kind": "other"}

    with pytest.raises(ValueError, match="tokenizer was"):
        run(stopped, tokenizer=OtherTokenizer(), resume=True)


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: there is no .*checkpoint\.pt"):
        run(tmp_path, resume=True)
    save_checkpoint(tmp_path / "checkpoint.pt", DIYForCausalLM(MODEL))
    with pytest.raises(ValueError, match="holds a model, but no training run to resume"):
        run(tmp_path, resume=True)


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {letter: i for i, letter in enumerate("Dcumentsayhlo0123456789: ")}
    text = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[])).to_str()
    tokenizer = JsonTokenizer(text)
    run(tmp_path, tokenizer=tokenizer)
    assert state(tmp_path)["training"]["tokenizer"] == {"kind": "tokenizer.json", "json": text}
