"""The parts of a training step, and a whole small run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel._compat import FUSED_DEVICES
from diymodel.checkpoint import load_checkpoint, read_checkpoint
from diymodel.config import PRESETS, DIYConfig, TrainConfig
from diymodel.data import IGNORE, Batch, Rows
from diymodel.loss import next_token_loss, num_scored
from diymodel.model import DIYForCausalLM
from diymodel.plot import HELD_OUT, INK, TRAINING
from diymodel.tokenizer import ByteTokenizer
from diymodel.train import (
    evaluate,
    learning_rate_at,
    make_optimizer,
    train,
    train_step,
)

TOKENIZER = ByteTokenizer()
TINY = DIYConfig(
    vocab_size=258, num_layers=1, hidden_size=16, num_heads=2, max_seq_len=16, dropout=0.0, tie_word_embeddings=True
)
SHORT = TrainConfig(
    steps=4, batch_size=2, warmup_steps=1, eval_every=2, save_every=2, log_every=2, device="cpu", dtype="float32"
)
DOCUMENTS = [f"Document {i} says: {'hello ' * (i % 4)}" for i in range(20)]


def tiny_model(seed: int = 0, **changes: Any) -> DIYForCausalLM:
    torch.manual_seed(seed)
    return DIYForCausalLM(dataclasses.replace(TINY, **changes))


def silent(line: str) -> None:
    """No progress lines."""


# ----------------------------------------------------------------------------------------------------- learning rate


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0, 1))
def test_learning_rate_rises_to_the_highest_and_falls_to_the_last(steps: int, warmup: int, ratio: float) -> None:
    config = TrainConfig(steps=steps, warmup_steps=min(warmup, steps), min_lr_ratio=ratio, learning_rate=0.5)
    rates = [learning_rate_at(step, config) for step in range(steps)]
    top = config.warmup_steps
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))
    if top < steps:
        assert rates[top] == 0.5
    if top < steps - 1:
        assert rates[-1] == pytest.approx(0.5 * ratio)


def test_learning_rate_by_hand() -> None:
    config = TrainConfig(steps=7, warmup_steps=2, learning_rate=3.0, min_lr_ratio=0.0)
    assert [learning_rate_at(step, config) for step in range(7)] == pytest.approx(
        [1.0, 2.0, 3.0, 3 * (1 + math.sqrt(0.5)) / 2, 1.5, 3 * (1 - math.sqrt(0.5)) / 2, 0.0]
    )


# --------------------------------------------------------------------------------------------------------- optimizer


def test_weight_decay_is_for_matrices_and_every_parameter_is_in_one_group() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.25, beta1=0.8, beta2=0.9))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.25 if p.dim() == 2 else 0.0 for p in model.parameters()}
    fused = "cpu" in FUSED_DEVICES
    assert all(group["betas"] == (0.8, 0.9) and group["fused"] == fused for group in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------------ training step


class RecordingSGD(torch.optim.SGD):
    """Plain gradient descent at rate 0: a step leaves the weights, so that the gradient can be looked at."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def collate(rows: Sequence[Sequence[int]]) -> Batch:
    """A padded batch written independently of Rows: zeros at the padding."""
    T = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[IGNORE] * (T - len(row))] for row in rows])
    return Batch(ids, labels, torch.tensor([len(row) for row in rows]))


@given(
    st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=9), min_size=2, max_size=7),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
)
def test_micro_batches_have_the_gradient_of_the_whole_batch(rows: list[list[int]], size: int, seed: int) -> None:
    model = tiny_model(seed).double()
    parts = [collate(rows[first : first + size]) for first in range(0, len(rows), size)]
    whole = train_step(model, RecordingSGD(model), [collate(rows)], grad_clip=1e9)
    expected = gradients(model)
    split = train_step(model, RecordingSGD(model), parts, grad_clip=1e9)
    assert split.num_tokens == whole.num_tokens == sum(len(row) - 1 for row in rows)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_not_of_the_mean_of_means() -> None:
    """A guard for the test above: with uneven padding, the usual mistake gives another gradient."""
    model = tiny_model().double()
    batches = [collate([[5, 6]]), collate([[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11]])]
    train_step(model, RecordingSGD(model), batches, grad_clip=1e9)
    right = gradients(model)

    def gradient_of(loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        return gradients(model)

    def loss_of(batch: Batch, reduction: Any) -> Tensor:
        return next_token_loss(model(batch.input_ids, seq_lengths=batch.seq_lengths), batch.labels, reduction=reduction)

    tokens = sum(int(num_scored(batch.labels)) for batch in batches)
    sums = sum((loss_of(batch, "sum") for batch in batches), torch.zeros(())) / tokens
    means = sum((loss_of(batch, "mean") for batch in batches), torch.zeros(())) / len(batches)
    for a, b in zip(right, gradient_of(sums), strict=True):
        torch.testing.assert_close(a, b)
    difference = max(float((a - b).abs().max()) for a, b in zip(right, gradient_of(means), strict=True))
    assert difference > 1e-3


def test_gradients_do_not_pile_up_from_step_to_step() -> None:
    model, batch = tiny_model(), collate([[1, 2, 3]])
    optimizer = RecordingSGD(model)
    first = train_step(model, optimizer, [batch], grad_clip=1e9)
    assert train_step(model, optimizer, [batch], grad_clip=1e9) == first


def test_the_gradient_is_clipped_as_a_whole_and_reported_unclipped() -> None:
    model, batch = tiny_model(), collate([[1, 2, 3]])
    free = train_step(model, RecordingSGD(model), [batch], grad_clip=1e9)
    direction = torch.cat([g.flatten() for g in gradients(model)])
    clipped = train_step(model, RecordingSGD(model), [batch], grad_clip=free.grad_norm / 4)
    shorter = torch.cat([g.flatten() for g in gradients(model)])
    assert clipped.grad_norm == free.grad_norm == pytest.approx(float(direction.norm()), rel=1e-5)
    torch.testing.assert_close(shorter, direction / 4, rtol=1e-4, atol=1e-8)


def test_bfloat16_autocast_is_near_float32_and_keeps_float32_weights() -> None:
    model, batch = tiny_model(), collate([[1, 2, 3, 4, 5, 6]])
    exact = train_step(model, RecordingSGD(model), [batch], grad_clip=1e9)
    rounded = train_step(model, RecordingSGD(model), [batch], grad_clip=1e9, autocast_dtype=torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_evaluation_is_the_mean_over_all_tokens_and_the_bits_of_all_bytes(batching: str) -> None:
    model = tiny_model(max_seq_len=64)
    text = ["naïve", "abc"]
    rows = Rows(text, TOKENIZER, 64, batching)
    expected, tokens = 0.0, 0
    for i in range(len(rows)):
        ids = rows.batch([i]).input_ids
        with torch.no_grad():
            expected += float(next_token_loss(model.eval()(ids), ids, reduction="sum"))
        tokens += ids.shape[1] - 1
    result = evaluate(model, rows, batch_size=3)
    assert tokens == 6 + 1 + 3 + 1  # bytes, and an end for each document
    assert result.loss == pytest.approx(expected / tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / (6 + 3), rel=1e-5)


def test_evaluation_without_knowledge_costs_eight_bits_a_byte_and_a_little() -> None:
    """A head of zeros gives every one of the 258 tokens the same probability."""
    model = tiny_model(tie_word_embeddings=False)
    nn.init.zeros_(model.lm_head.weight)
    result = evaluate(model, Rows(["x" * 999], TOKENIZER, 16))
    assert result.loss == pytest.approx(math.log(258), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(258) * 1000 / 999, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_modes_weights_gradients_and_random_state(training: bool) -> None:
    model = tiny_model(dropout=0.5).train(training)
    model.lm_head.train(not training)
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    first = evaluate(model, Rows(["abcdef" * 9], TOKENIZER, 16))
    assert evaluate(model, Rows(["abcdef" * 9], TOKENIZER, 16)) == first  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluation_restores_the_mode_after_an_error() -> None:
    model = tiny_model().train()
    with pytest.raises(ValueError, match="max_seq_len"):
        evaluate(model, Rows(["abcdef" * 9], TOKENIZER, 32))
    assert model.training


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_leaves_checkpoint_metrics_and_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines: list[str] = []
    result = train(TINY, SHORT, DOCUMENTS, tmp_path / "new" / "run", log=lines.append)
    out = result.checkpoint.parent
    assert (result.step, result.interrupted) == (4, False)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "loss.svg", "metrics.jsonl"]

    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in steps] == [learning_rate_at(step, SHORT) for step in range(4)]
    assert steps[0]["loss"] == pytest.approx(math.log(258), rel=0.02)
    evaluations = [line for line in metrics if "bits_per_byte" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert result.evaluation is not None
    assert evaluations[-1]["bits_per_byte"] == result.evaluation.bits_per_byte

    loaded = load_checkpoint(result.checkpoint)
    for (name, a), b in zip(loaded.state_dict().items(), result.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    training = read_checkpoint(result.checkpoint).training
    assert training is not None
    assert training["tokenizer"] == {"kind": "bytes"}
    assert TrainConfig.from_dict(training["train_config"]) == SHORT

    text = "\n".join(lines)
    assert re.search(r"^step 4/4  loss \d\.\d{3}  lr 3\.00e-04  [\d,]+ tokens/s  0:00 left$", text, re.M)
    assert re.search(r"^step 4/4  held out: \d\.\d{3} nats/token, \d\.\d{3} bits/byte$", text, re.M)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_run_learns(tmp_path: Path, batching: str) -> None:
    config = dataclasses.replace(SHORT, steps=40, batch_size=4, learning_rate=1e-2, eval_every=40, batching=batching)
    result = train(TINY, config, DOCUMENTS, tmp_path, log=silent)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:40]]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    assert result.evaluation is not None
    assert result.evaluation.loss < 0.75 * losses[0]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> Tensor:
        result = train(TINY, dataclasses.replace(SHORT, seed=seed), DOCUMENTS, tmp_path / name, log=silent)
        return result.model.model.embed_tokens.weight.detach()

    torch.manual_seed(99)
    first = weights("a", seed=1)
    assert torch.equal(first, weights("b", seed=1))
    assert not torch.equal(first, weights("c", seed=2))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(TINY, SHORT, DOCUMENTS, tmp_path, log=silent)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"checkpoint\.pt is there already: .*--resume"):
        train(TINY, SHORT, DOCUMENTS, tmp_path, log=silent)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_diverging_run_stops_and_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(self: Rows, number: int, config: TrainConfig) -> Batch:
        if number == 3:
            nn.init.constant_(model[0].model.norm.weight, math.nan)
        return right(self, number, config)

    model: list[DIYForCausalLM] = []
    initialise = DIYForCausalLM.__init__

    def remember(self: DIYForCausalLM, config: DIYConfig) -> None:
        initialise(self, config)
        model.append(self)

    right = Rows.micro_batch
    monkeypatch.setattr(DIYForCausalLM, "__init__", remember)
    monkeypatch.setattr(Rows, "micro_batch", poisoned)
    with pytest.raises(FloatingPointError, match=r"loss nan .* at step 4: training has diverged.*below 0\.003"):
        train(TINY, SHORT, DOCUMENTS, tmp_path, log=silent)
    training = read_checkpoint(tmp_path / "checkpoint.pt").training
    assert training is not None
    assert training["step"] == 2


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=257 is too small: the tokenizer has 258 tokens"):
        train(dataclasses.replace(TINY, vocab_size=257), SHORT, DOCUMENTS, tmp_path / "run", log=silent)
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_a_line_says_how_to_get_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines: list[str] = []
    train(TINY, SHORT, DOCUMENTS, tmp_path, log=lines.append)
    assert "no loss curve, for want of matplotlib: pip install 'diymodel[plot]'" in lines
    assert not (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"], ids=["light", "dark"])
@pytest.mark.parametrize("ink", [INK, TRAINING, HELD_OUT])
def test_the_curve_can_be_read_on_a_light_and_on_a_dark_page(ink: str, page: str) -> None:
    """WCAG's contrast of graphics and large text, 3 : 1."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(ink), luminance(page)))
    assert (lighter + 0.05) / (darker + 0.05) >= 3


def test_it_trains_outside_the_main_thread_and_leaves_the_signal_handler(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    results: list[int] = []
    thread = threading.Thread(
        target=lambda: results.append(train(TINY, SHORT, DOCUMENTS, tmp_path / "a", log=silent).step)
    )
    thread.start()
    thread.join()
    assert results == [4]
    train(TINY, SHORT, DOCUMENTS, tmp_path / "b", log=silent)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    preset = PRESETS[name]
    assert preset.doc
    DIYConfig.from_dict(preset.model)
    TrainConfig.from_dict(preset.train)


def test_the_seed_must_fit_torch() -> None:
    TrainConfig(seed=2**64 - 1)
    with pytest.raises(ValueError, match=r"TrainConfig\.seed=18446744073709551616"):
        TrainConfig(seed=2**64)
