"""Timed with pytest-benchmark: ``pytest benchmarks --benchmark-only``. A plain ``pytest`` skips these.

One thread on a CPU. They show how a change moves the figures on one machine; for figures to be quoted, compare in turn
with :mod:`benchmarks.against_transformers`.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.against_transformers import NEW_TOKENS, PROMPT, TRAIN_BATCH, TRAIN_LENGTH, training_step
from benchmarks.decode_scaling import cached_step, uncached_step
from benchmarks.measure import Work
from benchmarks.shapes import SHAPES, build, random_ids

ROUNDS = {"T": 30, "S": 5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("shape", ["T", "S"]),
]


def measure(benchmark: BenchmarkFixture, work: Work, device: str, rounds: int) -> None:
    """One call a round; pytest-benchmark does not wait for a device, so the calls do."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def reset() -> None:
        if work.reset is not None:
            work.reset()
        wait()

    def run() -> None:
        work.run()
        wait()

    benchmark.pedantic(run, setup=reset, rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("length", [32, 256, 1024])
@pytest.mark.benchmark(group="decode step with cache")
def test_cached_step(benchmark: BenchmarkFixture, shape: str, device: str, length: int) -> None:
    model = build(SHAPES[shape]).to(device)
    with torch.inference_mode():
        work = cached_step(model, random_ids(model.config, 1, length, device))
        measure(benchmark, work, device, 3 * ROUNDS[shape])


@pytest.mark.parametrize("length", [32, 256, 1024])
@pytest.mark.benchmark(group="decode step without cache")
def test_uncached_step(benchmark: BenchmarkFixture, shape: str, device: str, length: int) -> None:
    model = build(SHAPES[shape]).to(device)
    with torch.inference_mode():
        measure(benchmark, uncached_step(model, random_ids(model.config, 1, length, device)), device, ROUNDS[shape])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.benchmark(group=f"generate {NEW_TOKENS} tokens")
def test_generate(benchmark: BenchmarkFixture, shape: str, device: str, use_cache: bool) -> None:
    model = build(SHAPES[shape]).to(device)
    prompt = random_ids(model.config, 1, PROMPT, device)
    rounds = max(2, ROUNDS[shape] // 4)
    measure(benchmark, Work(lambda: model.generate(prompt, NEW_TOKENS, use_cache=use_cache)), device, rounds)


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark: BenchmarkFixture, shape: str, device: str) -> None:
    model = build(SHAPES[shape]).to(device)
    ids = random_ids(model.config, TRAIN_BATCH, TRAIN_LENGTH, device)
    measure(benchmark, training_step(model, None, ids, torch.float32)["ours"], device, max(2, ROUNDS[shape] // 4))
