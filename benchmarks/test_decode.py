"""Decode steps and generations under pytest-benchmark: ``pytest --benchmark-only``. A plain ``pytest`` skips these.

One thread on a CPU. They show how a change moves the figures on one machine; for figures to be quoted, compare in turn
with ``diymodel bench``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import Time
from diymodel.bench.caches import ConcatenatedDecoder, MaskedDecoder
from diymodel.bench.decode import ROOM, cached_step, uncached_step
from diymodel.bench.decoders import OwnDecoder, random_ids
from diymodel.bench.models import build
from diymodel.bench.shapes import SHAPES
from diymodel.bench.timing import Work

ROUNDS = {"T256": 1, "T": 30, "S": 5}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [64, 256, 1024]
PROMPT, NEW_TOKENS = 32, 64

pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("shape", ["T", "S"])]


@pytest.mark.parametrize("cache", ["ours", "concatenated", "masked"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.benchmark(group="decode step with cache")
def test_cached_step(time_work: Time, shape: str, device: str, length: int, cache: str) -> None:
    model = build(SHAPES[shape]).to(device)
    decoder = {
        "ours": OwnDecoder,
        "concatenated": ConcatenatedDecoder,
        "masked": lambda model: MaskedDecoder(model, LENGTHS[-1] + ROOM),
    }[cache](model)
    with torch.inference_mode():
        work = cached_step(decoder, random_ids(model.config.vocab_size, 1, length, torch.device(device)))
        time_work(work, device, 3 * ROUNDS[shape], f"{shape}, {device}, {cache} cache", length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.benchmark(group="decode step without cache")
def test_uncached_step(time_work: Time, shape: str, device: str, length: int) -> None:
    model = build(SHAPES[shape]).to(device)
    ids = random_ids(model.config.vocab_size, 1, length, torch.device(device))
    with torch.inference_mode():
        work = uncached_step(OwnDecoder(model), ids)
        time_work(work, device, ROUNDS[shape], f"{shape}, {device}, without cache", length)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.benchmark(group=f"generate {NEW_TOKENS} tokens")
def test_generate(time_work: Time, shape: str, device: str, use_cache: bool) -> None:
    model = build(SHAPES[shape]).to(device)
    prompt = random_ids(model.config.vocab_size, 1, PROMPT, torch.device(device))
    rounds = max(2, ROUNDS[shape] // 4)
    time_work(Work(lambda: model.generate(prompt, NEW_TOKENS, use_cache=use_cache)), device, rounds)
