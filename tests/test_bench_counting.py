"""FLOPs, memory and growth as ``diymodel bench`` counts them: exact, on every machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conftest import exponents
from diymodel import DIYConfig
from diymodel.bench.caches import ConcatenatedDecoder, MaskedDecoder
from diymodel.bench.decode import cached_step, step_peak
from diymodel.bench.decoders import Benched, OwnDecoder
from diymodel.bench.figures import Fit
from diymodel.bench.memory import peak_bytes
from diymodel.bench.models import build
from diymodel.bench.scaling import (
    StepCost,
    count_step,
    count_steps,
    integral,
    overtakes,
    recomputes,
    total,
    total_flops,
)
from diymodel.bench.shapes import SHAPES
from diymodel.cost import decode_flops, kv_bytes_per_token, num_parameters, prefill_flops
from diymodel.counting import Flops, count_flops

META, CPU = torch.device("meta"), torch.device("cpu")
TINY = DIYConfig(vocab_size=31, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, max_seq_len=128, dropout=0.0)


def counted(config: DIYConfig, dtype: torch.dtype = torch.float32) -> Any:
    return Benched(None, config).decoder(META, dtype)


@pytest.fixture(scope="module")
def growth() -> Mapping[str, Mapping[str, Fit]]:
    return exponents()


def test_without_cache_a_generation_is_quadratic_and_its_attention_cubic(growth: Mapping[str, Any]) -> None:
    fit = growth["no_cache"]
    assert 2.0 < fit["all"].exponent < 2.2
    assert fit["linear"].exponent == pytest.approx(2.0, abs=0.01)
    assert fit["attention"].exponent == pytest.approx(3.0, abs=0.01)
    assert fit["all"].local == sorted(fit["all"].local), "the longer, the more attention weighs"


def test_with_cache_a_generation_is_linear_and_its_attention_quadratic(growth: Mapping[str, Any]) -> None:
    fit = growth["cached"]
    assert 1.0 < fit["all"].exponent < 1.1
    assert fit["linear"].exponent == pytest.approx(1.0, abs=0.01)
    assert fit["attention"].exponent == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(("name", "length"), [("T", 1), ("T", 2), ("T", 33), ("L", 33)])
def test_counted_flops_are_the_formulas(name: str, length: int) -> None:
    config, decoder = SHAPES[name], counted(SHAPES[name])
    cached, uncached = (count_step(decoder, length, use_cache) for use_cache in (True, False))
    assert cached.flops.total == decode_flops(config, length - 1)
    assert uncached.flops.total == prefill_flops(config, length, logits_to_keep=1)
    assert cached.kv_bytes == length * kv_bytes_per_token(config)
    assert uncached.kv_bytes is None


def test_attention_is_what_no_weight_takes_part_in() -> None:
    config, length = SHAPES["T"], 9
    step = count_step(counted(config), length, use_cache=True)
    assert step.flops.attention == 4 * config.num_layers * config.num_heads * config.head_size * length
    matrices = num_parameters(config) - (2 * config.num_layers + 1) * config.hidden_size
    assert step.flops.linear == 2 * (matrices - config.vocab_size * config.hidden_size)  # the embedding is looked up


class Odd(nn.Module):
    """Weights used in ways that hide them: transposed, cast, expanded into a batch, unpacked from integers."""

    packed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))
        self.register_buffer("packed", torch.ones(4, 6, dtype=torch.int8))
        self.register_buffer("kv_cache", torch.ones(2, 6, 3))

    def forward(self, x: Tensor) -> Tensor:  # (2, 3, 4)
        y = x.double() @ (2 * self.weight.double().t().contiguous()).t().expand(2, 4, 6)
        z = F.linear(x, self.packed.float().t() * 0.5)
        return (y.float() + z) @ self.kv_cache


def test_a_weight_stays_a_weight_when_it_is_cast_or_unpacked_and_a_cache_is_none() -> None:
    flops = count_flops(lambda: module(torch.ones(2, 3, 4)), module := Odd())
    assert flops == Flops(linear=2 * 2 * (2 * 3 * 4 * 6), attention=2 * (2 * 3 * 6 * 3))


def test_a_sparse_weight_which_has_no_storage_hinders_nothing() -> None:
    dense, sparse = nn.Linear(4, 4, bias=False), nn.Parameter(torch.eye(4).to_sparse())
    module, x = nn.ParameterList([*dense.parameters(), sparse]), torch.ones(4, 4)
    assert count_flops(lambda: dense(torch.sparse.mm(sparse, x)), module) == Flops(2 * 4 * 4 * 4, 0)


def test_peak_memory_is_of_what_lives_at_once() -> None:
    x = torch.ones(1000)

    def one_after_the_other() -> Tensor:
        for _ in range(5):
            y = x + 1
        return y

    assert peak_bytes(one_after_the_other, CPU) == 2 * x.nbytes  # a new one is made before the name lets go of the old
    assert peak_bytes(lambda: [x + 1 for _ in range(5)], CPU) == 5 * x.nbytes
    assert peak_bytes(lambda: x.view(10, 100).t(), CPU) == 0
    assert peak_bytes(lambda: torch.ones(7, device="meta"), CPU) == 28


def test_what_a_step_allocates() -> None:
    config = dataclasses.replace(TINY, num_kv_heads=None)  # before torch 2.5, shared keys are copied for attention
    model, kv = build(config), kv_bytes_per_token(config)

    def peak(decoder: Any, length: int) -> int:
        with torch.no_grad():
            return step_peak(cached_step(decoder, torch.ones(1, length, dtype=torch.int64)), CPU)

    assert peak(OwnDecoder(model), 64) == peak(OwnDecoder(model), 32), "ours writes in place"
    grown = [peak(ConcatenatedDecoder(model), length) for length in (32, 64)]
    assert grown[1] - grown[0] >= 32 * kv, "torch.cat copies the whole cache"


def test_half_types_halve_the_cache() -> None:
    half, single = (count_step(counted(TINY, dtype), 5, True).kv_bytes for dtype in (torch.bfloat16, torch.float32))
    assert half is not None
    assert 2 * half == single


def test_other_caches_cost_what_makes_them_others() -> None:
    module = counted(TINY).module
    ours = count_steps(OwnDecoder(module), [32, 64], use_cache=True)
    grown = count_steps(ConcatenatedDecoder(module), [32, 64], use_cache=True)
    masked = count_steps(MaskedDecoder(module, 100), [32, 64], use_cache=True)
    assert {t: step.flops for t, step in grown.items()} == {t: step.flops for t, step in ours.items()}
    assert masked[32].flops == masked[64].flops
    assert masked[32].flops.attention == 100 * ours[32].flops.attention // 32
    assert masked[32].kv_bytes == 100 * kv_bytes_per_token(TINY)


@pytest.mark.parametrize("prompt", [1, 5])
def test_a_total_is_the_sum_of_all_its_steps(prompt: int) -> None:
    decoder = counted(TINY)
    lengths = range(prompt, prompt + 9)
    for use_cache in (False, True):
        costs = count_steps(decoder, [9], use_cache)
        prefill = count_step(decoder, prompt, use_cache=False)
        found = total_flops(costs, prefill if use_cache else None, prompt, 9)
        steps = [decode_flops(TINY, t - 1) if use_cache else prefill_flops(TINY, t, 1, 1) for t in lengths]
        if use_cache:
            steps[0] = prefill_flops(TINY, prompt, 1, 1)
        assert found["flops"] == sum(steps)
        assert found["flops"] == found["linear_flops"] + found["attention_flops"]
        assert found["exact"] is True


def test_a_total_of_what_is_no_polynomial_is_refused_and_estimated() -> None:
    costs = {t: t**3 for t in (2, 3, 4, 8)}
    with pytest.raises(ValueError, match="the step at 8 positions costs 512 FLOPs and not"):
        total(costs, 1, 8)
    steps = {t: StepCost(Flops(cost, 0), None) for t, cost in costs.items()}
    found = total_flops(steps, None, 2, 3)
    assert (found["flops"], found["exact"]) == (8 + 27 + 64, False)


def test_attention_overtakes_at_six_times_the_width() -> None:
    config = DIYConfig(vocab_size=1, hidden_size=48, num_heads=4, intermediate_size=128)
    assert overtakes(count_steps(counted(config), [], use_cache=True)) == pytest.approx(6 * 48, rel=0.01)


def test_integral_is_exact_on_straight_lines() -> None:
    assert integral({2: 4.0, 4: 8.0}, 1, 5) == 4 + 4 + 6 + 8 + 8  # outside, the nearest one


def test_recomputing_shows_in_the_products_with_weights() -> None:
    decoder = OwnDecoder(build(TINY).to("meta"))
    assert recomputes(count_steps(decoder, [16, 32, 64], use_cache=True), [16, 32, 64]) is None
    reason = recomputes(count_steps(decoder, [16, 32, 64], use_cache=False), [16, 32, 64])
    assert reason is not None
    assert "t^1.00 where a cached step's are constant" in reason
