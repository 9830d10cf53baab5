"""The model's own interface: what it refuses, how it starts, masks and kept logits, the numerics of its parts.

What holds for any causal language model is checked by the harness: tests/properties.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM, DIYModel, next_token_loss
from diymodel.cache import Span
from diymodel.linear import Linear
from diymodel.model import Attention, RMSNorm, RotaryEmbedding
from tests.strategies import SEEDS, Case, assert_near, cases, lengths

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_have_the_models_dtype(dtype: torch.dtype) -> None:
    model = DIYForCausalLM(CONFIG).to(dtype).eval()
    logits = model(IDS)
    assert logits.dtype == model(IDS, use_cache=True)[0].dtype == dtype
    assert logits.isfinite().all()


@given(case=cases(), data=st.data())
def test_kept_logits_are_the_last_of_each_row(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(st.none() | lengths(case), "lengths")
    ends = [case.length] * case.num_rows if row_lengths is None else row_lengths.tolist()
    count = data.draw(st.integers(1, min(ends)), "count")
    model = case.model()
    full = model(case.input_ids, seq_lengths=row_lengths)
    expected = torch.stack([row[end - count : end] for row, end in zip(full, ends, strict=True)])
    kept = model(case.input_ids, seq_lengths=row_lengths, logits_to_keep=count)
    cached, _ = model(case.input_ids, seq_lengths=row_lengths, logits_to_keep=count, use_cache=True)
    assert_near(kept, expected)
    assert_near(cached, expected)


def mask_of(row_lengths: Tensor, length: int) -> Tensor:
    return (torch.arange(length) < row_lengths[:, None]).long()


@given(case=cases(), data=st.data())
def test_mask_and_lengths_say_the_same(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case, shortest=0), "lengths")
    model = case.model()
    expected = model(case.input_ids, seq_lengths=row_lengths)
    for dtype in (torch.int64, torch.bool, torch.float32):
        mask = mask_of(row_lengths, case.length).to(dtype)
        assert torch.equal(model(case.input_ids, attention_mask=mask), expected)


@given(case=cases(min_length=2), data=st.data())
def test_a_mask_that_is_not_right_padded_is_refused(case: Case, data: st.DataObject) -> None:
    """A 1 after a 0, as on the left or in a hole, or a value that is neither."""
    mask = mask_of(data.draw(lengths(case, shortest=0), "lengths"), case.length)
    row = mask[data.draw(st.integers(0, case.num_rows - 1), "row")]
    hole = data.draw(st.integers(0, case.length - 2), "hole")
    row[hole] = 0
    row[data.draw(st.integers(hole + 1, case.length - 1), "behind")] = data.draw(st.sampled_from((1, 2, -1)), "value")
    with pytest.raises(ValueError, match="attention_mask"):
        case.model()(case.input_ids, attention_mask=mask)


@given(case=cases(), data=st.data())
def test_no_input_is_written_to(case: Case, data: st.DataObject) -> None:
    row_lengths = data.draw(lengths(case), "lengths")
    model = case.model()
    for padding in ({"seq_lengths": row_lengths}, {"attention_mask": mask_of(row_lengths, case.length)}):
        inputs = {"input_ids": case.input_ids, **padding}
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        for use_cache in (False, True):
            model(**inputs, use_cache=use_cache)
            assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


@given(case=cases(min_length=3, max_sharpness=1), seed=SEEDS)
def test_the_gradient_is_the_slope_of_the_loss(case: Case, seed: int) -> None:
    """Along a random direction, against a fourth-order central difference.

    Rounding adds a few eps / step = 2e-10, and the formula step⁴ = 1e-24 times a fifth derivative, which a norm of a
    small vector makes large (1e14 was seen). The bound is relative to the largest slope that there could be, the
    product of both lengths.
    """
    model, ids, step = case.model(), case.input_ids, 1e-6
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(next_token_loss(model(ids), ids), parameters, materialize_grads=True)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    start = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for parameter, origin, direction in zip(parameters, start, directions, strict=True):
            parameter.copy_(origin + distance * direction)
        return next_token_loss(model(ids), ids).item()

    near, far = loss_at(step) - loss_at(-step), loss_at(2 * step) - loss_at(-2 * step)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    steepest = math.prod(math.sqrt(sum(float(t.pow(2).sum()) for t in part)) for part in (gradients, directions))
    assert abs(slope - (8 * near - far) / (12 * step)) <= 1e-7 * max(1.0, steepest)


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


def test_half_types_lie_row_by_row_whenever_they_come() -> None:
    model = DIYForCausalLM(DIYConfig(num_layers=1, hidden_size=512)).eval()
    assert model.bfloat16().lm_head.weight.is_contiguous()
    assert model.eval().half().lm_head.weight.is_contiguous()
    assert model.float().lm_head.weight.stride() == (1, 6400)
    assert model.train().double().lm_head.weight.is_contiguous()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_training_attention_in_half_types_is_float32s_on_a_cpu(dtype: torch.dtype) -> None:
    """And so is its gradient; from 257 positions on torch's own kernel is the faster one."""
    part = Attention(replace(CONFIG, max_seq_len=257)).train()
    wide: list[torch.dtype] = []
    with mock.patch("diymodel.model.attention", lambda q, k, v, **_: wide.append(q.dtype) or v):
        for T in (256, 257):
            q, k, v = torch.randn(3, 1, 2, T, 4, dtype=dtype)
            with torch.autocast("cpu", dtype):
                assert part._attend(q, k, v, None).dtype == dtype
        part.eval()._attend(*torch.randn(3, 1, 2, 3, 4, dtype=dtype), None)
    assert wide == [torch.float32, dtype, dtype]


def test_dropout_acts_on_the_embedding_and_on_both_updates_of_every_block() -> None:
    model = DIYForCausalLM(replace(CONFIG, dropout=0.5)).train()
    with mock.patch.object(F, "dropout", wraps=F.dropout) as dropout:
        model(IDS)
        assert [call.args[1] for call in dropout.call_args_list] == [0.5] * (1 + 2 * CONFIG.num_layers)
        dropout.reset_mock()
        model.eval()(IDS)
        dropout.assert_not_called()


def test_logits_of_a_cached_call_record_no_gradient() -> None:
    model = DIYForCausalLM(DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=16)).eval()
    logits, past = model(torch.tensor([[1, 2]]), use_cache=True)
    assert not logits.requires_grad
    assert not model(torch.tensor([[3]]), past_key_values=past).requires_grad
    assert model(torch.tensor([[1, 2]])).requires_grad
