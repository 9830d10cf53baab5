"""A training step under pytest-benchmark: float32, bfloat16 autocast, compiled."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Time
from benchmarks.test_decode import DEVICES, ROUNDS
from diymodel.bench.decoders import random_ids
from diymodel.bench.models import build
from diymodel.bench.shapes import SHAPES
from diymodel.bench.training import training_step

BATCH, LENGTH = 8, 128


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["T", "S"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.benchmark(group="training step")
def test_training_step(time_work: Time, shape: str, device: str, kind: str) -> None:
    _train(time_work, shape, device, getattr(torch, kind), compiled=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.benchmark(group="training step, compiled")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_training_step(time_work: Time, device: str) -> None:
    _train(time_work, "T", device, torch.float32, compiled=True)


def _train(time_work: Time, shape: str, device: str, dtype: torch.dtype, compiled: bool) -> None:
    model = build(SHAPES[shape]).to(device)
    ids = random_ids(model.config.vocab_size, BATCH, LENGTH, torch.device(device))
    time_work(training_step(model, model, ids, dtype, compiled), device, max(2, ROUNDS[shape] // 4))
