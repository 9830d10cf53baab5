"""What the model refuses, how it starts, and the numerics of its parts; its behaviour is in tests/properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diymodel import DIYConfig, DIYForCausalLM, DIYModel, next_token_loss
from diymodel.cache import Span
from diymodel.model import Linear, RMSNorm, RotaryEmbedding

CONFIG = DIYConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=2, max_seq_len=6, dropout=0.0)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def model() -> DIYForCausalLM:
    return DIYForCausalLM(CONFIG).eval()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[1, 11]])}, r"token id 11 is outside the vocabulary \[0, 11\)"),
        ({"input_ids": torch.tensor([[-1, 0]])}, r"token id -1 is outside the vocabulary"),
        ({"input_ids": torch.tensor([[1.0]])}, r"int64 token ids .* got torch.float32 of shape \(1, 1\)"),
        ({"input_ids": torch.tensor([1, 2])}, r"got torch.int64 of shape \(2,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.zeros(1, 7, dtype=torch.int64)}, r"7 positions \(0 cached, 7 new\).*max_seq_len=6"),
        ({"seq_lengths": torch.tensor([1, 4])}, r"seq_lengths \[1, 4\] must be between 0 and the 3 tokens"),
        ({"seq_lengths": torch.tensor([-1, 3])}, r"seq_lengths \[-1, 3\]"),
        ({"seq_lengths": torch.tensor([3])}, r"seq_lengths must be int64 of shape \(2,\)"),
        ({"seq_lengths": torch.tensor([3.0, 3.0])}, "got torch.float32"),
        ({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, r"row 0 is \[0, 1, 1\]: a 1 follows a 0"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}, r"row 1 is \[1, 0, 1\]"),
        ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 1]])}, "1 for tokens and 0 for padding"),
        ({"attention_mask": torch.tensor([[1, 1, 0.5], [1, 1, 1]])}, "1 for tokens and 0 for padding"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \(2, 4\) must have the shape of input_ids \(2, 3\)"),
        ({"attention_mask": torch.ones(2, 3), "seq_lengths": torch.tensor([3, 3])}, "give one of them"),
        ({"logits_to_keep": 4}, "logits_to_keep=4 must be 0 .* at most the 3 tokens"),
        ({"logits_to_keep": -1}, "logits_to_keep=-1"),
        ({"logits_to_keep": 2, "seq_lengths": torch.tensor([3, 1])}, "at most the 1 tokens of the shortest row"),
    ],
)
def test_bad_input_is_refused(model: DIYForCausalLM, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS} | inputs)


def test_a_cache_in_training_mode_is_refused() -> None:
    model = DIYForCausalLM(CONFIG)
    _, past = model.eval()(IDS, use_cache=True)
    model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model(IDS, use_cache=True)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model(IDS, past_key_values=past)


def test_backbone_returns_hidden_states(model: DIYForCausalLM) -> None:
    backbone: DIYModel = model.model
    hidden = backbone(IDS)
    assert hidden.shape == (2, 3, CONFIG.hidden_size)
    cached, presents = backbone(IDS, use_cache=True)
    torch.testing.assert_close(cached, hidden)
    assert len(presents) == CONFIG.num_layers


@pytest.mark.parametrize("tie", [False, True])
def test_first_loss_is_near_that_of_guessing(tie: bool) -> None:
    torch.manual_seed(0)
    config = DIYConfig(tie_word_embeddings=tie)
    ids = torch.randint(config.vocab_size, (4, 64))
    with torch.no_grad():
        loss = next_token_loss(DIYForCausalLM(config).eval()(ids), ids)
    assert abs(float(loss) - math.log(config.vocab_size)) < 0.15


def test_residual_projections_start_smaller() -> None:
    torch.manual_seed(0)
    block = DIYForCausalLM(DIYConfig(num_layers=8)).model.layers[0]
    assert block.self_attn.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for projection in (block.self_attn.o_proj, block.mlp.down_proj):
        assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02)


def test_large_weights_are_laid_out_for_the_mode() -> None:
    linear = Linear(512, 1024, std=0.02)
    values = linear.weight.detach().clone()
    assert linear.eval().weight.stride() == (1, 1024)
    linear.load_state_dict({"weight": values + 1})
    assert linear.weight.stride() == (1, 1024)
    assert linear.train().weight.stride() == (512, 1)
    assert torch.equal(linear.weight, values + 1)


def test_a_mode_set_in_inference_mode_leaves_weights_that_train() -> None:
    model = DIYForCausalLM(DIYConfig(num_layers=1, hidden_size=512))
    with torch.inference_mode():
        model.eval()
    assert model.lm_head.weight.stride() == (1, 6400)
    for mode in (False, True, False):  # a gradient goes along, or torch warns of its other layout
        next_token_loss(model.train(mode)(IDS), IDS).backward()
        assert model.lm_head.weight.grad is not None
        assert model.lm_head.weight.grad.stride() == model.lm_head.weight.stride()


def test_generating_in_training_leaves_the_layout_to_the_optimizer() -> None:
    model = DIYForCausalLM(DIYConfig(num_layers=1, hidden_size=512))
    model.generate(torch.tensor([[1]]), 1)
    assert all(weight.is_contiguous() for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_squares_in_float32(dtype: torch.dtype) -> None:
    """300² overflows float16; the norm of [300, -300, …] is ±1 all the same."""
    hidden = torch.tensor([300.0, -300.0, 300.0, -300.0], dtype=dtype)
    assert RMSNorm(4).to(dtype)(hidden).tolist() == [1.0, -1.0, 1.0, -1.0]


def test_rms_norm_of_zeros_is_zero_with_a_finite_gradient() -> None:
    hidden = torch.zeros(3, 4, requires_grad=True)
    RMSNorm(4)(hidden).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_rms_norm_uses_its_epsilon() -> None:
    hidden = torch.full((1, 4), 2.0, dtype=torch.float64)
    assert RMSNorm(4, eps=5.0).double()(hidden).tolist() == [[2 / 3] * 4]


def test_rotary_angles_stay_exact_far_out_in_half_precision() -> None:
    """In bfloat16, position 1001 and 1000 are one number; the table must still tell them apart."""
    rotary = RotaryEmbedding(head_size=4, theta=10000.0)
    cos, sin = rotary(Span.after(1000, 1000, 2, None), torch.empty(0, dtype=torch.bfloat16))
    expected = torch.tensor([[math.cos(p), math.cos(p / 100)] * 2 for p in (1000, 1001)])
    torch.testing.assert_close(cos.float(), expected, atol=2**-8, rtol=0)
    assert (sin[:, :2] == -sin[:, 2:]).all()


def test_a_rotary_table_made_in_inference_mode_serves_training() -> None:
    model = DIYForCausalLM(CONFIG)
    with torch.inference_mode():
        model.eval()(IDS)
    next_token_loss(model.train()(IDS), IDS).backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_dtype_can_change_after_a_forward() -> None:
    model = DIYForCausalLM(CONFIG).eval()
    single = model(IDS)
    torch.testing.assert_close(model.double()(IDS).float(), single)


def test_autocast_trains_and_generates_in_bfloat16() -> None:
    model = DIYForCausalLM(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IDS)
        next_token_loss(logits, IDS).backward()
        generated = model.generate(IDS, 2)
    assert logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert generated.shape == (2, 5)
