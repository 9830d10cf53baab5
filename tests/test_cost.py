"""The formulas of diymodel.cost against what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diymodel import DIYConfig, DIYForCausalLM
from diymodel._compat import SDPBackend, sdpa_kernel
from diymodel.cost import decode_flops, kv_bytes_per_token, num_parameters, prefill_flops

CONFIGS = [
    DIYConfig(vocab_size=11, num_layers=1, hidden_size=8, num_heads=2),
    DIYConfig(vocab_size=40, num_layers=3, hidden_size=24, num_heads=6, num_kv_heads=2, intermediate_size=20),
    DIYConfig(vocab_size=40, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=1, tie_word_embeddings=True),
]


def counted_flops(model: DIYForCausalLM, **inputs: object) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS)
def test_num_parameters_counts_tied_weights_once(config: DIYConfig) -> None:
    assert num_parameters(config) == sum(p.numel() for p in DIYForCausalLM(config).parameters())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("batch", "length", "kept"), [(1, 1, 0), (1, 7, 0), (3, 7, 2)])
def test_prefill_flops_are_what_torch_counts(config: DIYConfig, batch: int, length: int, kept: int) -> None:
    model = DIYForCausalLM(config).eval()
    ids = torch.zeros(batch, length, dtype=torch.int64)
    assert prefill_flops(config, length, batch, kept) == counted_flops(model, input_ids=ids, logits_to_keep=kept)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("batch", "position"), [(1, 1), (1, 9), (2, 30)])
def test_decode_flops_are_what_torch_counts(config: DIYConfig, batch: int, position: int) -> None:
    model = DIYForCausalLM(config).eval()
    ids = torch.zeros(batch, position, dtype=torch.int64)
    _, past = model(ids, use_cache=True)
    assert decode_flops(config, position, batch) == counted_flops(
        model, input_ids=ids[:, :1], past_key_values=past, use_cache=True
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_are_those_of_the_cache(config: DIYConfig, dtype: torch.dtype) -> None:
    _, past = DIYForCausalLM(config).to(dtype).eval()(torch.zeros(1, 5, dtype=torch.int64), use_cache=True)
    held = sum(cached[name].nbytes for cached, _ in past for name in ("k", "v"))
    assert held == 5 * kv_bytes_per_token(config, dtype.itemsize)
