"""A prompt read at once, under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Time
from benchmarks.test_decode import DEVICES, ROUNDS
from diymodel.bench.models import build
from diymodel.bench.prefill import works
from diymodel.bench.shapes import SHAPES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["T", "S"])
@pytest.mark.parametrize("length", [32, 256, 1024])
@pytest.mark.benchmark(group="prefill")
def test_prefill(time_work: Time, shape: str, device: str, length: int) -> None:
    model = build(SHAPES[shape]).to(device)
    work = works(model, None, model.config, length, torch.device(device))["ours"]
    with torch.inference_mode():
        time_work(work, device, ROUNDS[shape], f"{shape}, {device}, prefill", length)
