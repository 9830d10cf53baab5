"""next_token_loss by hand, what it refuses, and its arguments.

Its value and gradient on random logits are checked by the harness, which knows neither ``ignore_index`` nor
``reduction``: tests/properties.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diymodel import loss
from diymodel.loss import num_scored
from diymodel.verify.strategies import chunk_sizes
from tests.strategies import SEEDS, assert_near

LOGITS = torch.zeros(2, 3, 5)
LABELS = torch.tensor([[0, 1, 2], [3, 4, -100]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS[:, 1:]}, r"got \(2, 3, 5\) and \(2, 2\); labels are given unshifted"),
        ({"logits": LOGITS[0]}, r"logits must be \(batch, seq, vocab\)"),
        ({"labels": LABELS.int()}, "labels must be int64, got torch.int32"),
        ({"labels": torch.full((2, 3), 5)}, r"label 5 is neither a token id in \[0, 5\) nor ignore_index=-100"),
        ({"labels": torch.full((2, 3), -1)}, r"label -1 is neither"),
        ({"labels": torch.tensor([[-1, 0, 4], [1, 2, 3]])}, r"label -1 is neither"),
        ({"labels": torch.tensor([[0, 5, 4], [1, 2, 3]])}, r"label 5 is neither"),
        ({"reduction": "none"}, "reduction='none': must be 'mean' or 'sum'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.next_token_loss(**{"logits": LOGITS, "labels": LABELS} | arguments)


def test_the_first_label_and_the_ignored_are_not_scored() -> None:
    assert num_scored(LABELS) == 3
    assert num_scored(LABELS, ignore_index=1) == 3
    assert num_scored(LABELS[:, :1]) == 0


def test_a_single_token_has_nothing_to_predict() -> None:
    logits = torch.zeros(2, 1, 5, requires_grad=True)
    value = loss.next_token_loss(logits, LABELS[:, :1])
    value.backward()
    assert value == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_what_has_no_values_is_not_looked_at() -> None:
    """A batch of no rows, and tensors on the meta device, which have a shape alone."""
    assert loss.next_token_loss(LOGITS[:0], LABELS[:0]) == 0
    assert loss.next_token_loss(LOGITS.to("meta"), LABELS.to("meta")).shape == ()


def test_a_vocabulary_of_one_token_is_predicted_for_sure() -> None:
    assert loss.next_token_loss(LOGITS[..., :1], torch.tensor([[0, 0, -100], [-100, 0, 0]])) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = loss.next_token_loss(logits, LABELS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss.next_token_loss(logits.float(), LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("labels", "value", "gradient"),
    [
        # Labels 1 and 0 come next, with probabilities 1/2 and 3/4.
        ([0, 1, 0], (math.log(2) + math.log(4 / 3)) / 2, [[0.25, -0.25], [-0.125, 0.125], [0.0, 0.0]]),
        ([0, 1, -100], math.log(2), [[0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]),
        ([-100, -100, 0], math.log(4 / 3), [[0.0, 0.0], [-0.25, 0.25], [0.0, 0.0]]),
        ([0, -100, -100], 0.0, [[0.0, 0.0]] * 3),
    ],
)
def test_value_and_gradient_by_hand(
    dtype: torch.dtype, labels: list[int], value: float, gradient: list[list[float]]
) -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [9.0, 9.0]]], dtype=dtype, requires_grad=True)
    seen = loss.next_token_loss(logits, torch.tensor([labels]))
    (seen_gradient,) = torch.autograd.grad(seen, logits)
    torch.testing.assert_close(seen, torch.tensor(value, dtype=dtype))
    torch.testing.assert_close(seen_gradient, torch.tensor([gradient], dtype=dtype))


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and labels (B, T), of which none, some or all are -100."""
    B, T, V = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(3, 6))
    row = st.lists(st.integers(-1, V - 1), min_size=T, max_size=T)
    labels = torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = 3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    return logits, labels.masked_fill(labels == -1, -100)


@given(batch=scored(), ignored=st.sampled_from((-1, 0, 2)))
def test_any_label_can_be_the_ignored_one(batch: tuple[Tensor, Tensor], ignored: int) -> None:
    """A token as well: its label is then ignored like any other."""
    logits, labels = batch
    seen = loss.next_token_loss(logits, labels.masked_fill(labels == -100, ignored), ignore_index=ignored)
    assert seen == loss.next_token_loss(logits, labels.masked_fill(labels == ignored, -100))


@given(batch=scored(), data=st.data())
def test_sums_over_micro_batches_make_the_mean_of_the_whole(batch: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    logits, labels = batch
    sizes = data.draw(chunk_sizes(len(logits)), "sizes")
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    total = torch.stack([loss.next_token_loss(*part, reduction="sum") for part in parts]).sum()
    assert_near(total / num_scored(labels).clamp(min=1), loss.next_token_loss(logits, labels))
