"""The loss scores each position against the next token, over the live labels only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.oracles import oracle_loss
from tests.properties.compare import assert_identical, assert_same

Loss = Callable[..., Tensor]  # loss(logits, labels, ignore_index=…, reduction="mean" or "sum")


def rounding_of(logits: Tensor) -> tuple[float, float]:
    """Tolerance and scale of a loss of these logits: one eps for each of its additions, times the largest term."""
    terms = logits.shape[0] * logits.shape[1] + 4 * logits.shape[2]
    return terms * torch.finfo(logits.dtype).eps, max(1.0, float(logits.detach().abs().max()))


def value_and_gradient_equal_the_oracle(loss: Loss, logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Value and gradient are those of a float64 loop; with no live label both are 0, never NaN."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels, ignore_index=ignore_index)
    (gradient,) = torch.autograd.grad(value, logits)
    expected, expected_gradient = oracle_loss(logits.tolist(), labels.tolist(), ignore_index)
    tolerance, scale = rounding_of(logits)
    assert_same(value, torch.tensor(expected, dtype=torch.float64), "loss", tolerance, scale)
    # A softmax carries the rounding of its scores, so the gradient has the scale of the logits as well.
    assert_same(
        gradient, torch.tensor(expected_gradient, dtype=torch.float64), "gradient of the loss", tolerance, scale
    )


def micro_batches_add_up(loss: Loss, logits: Tensor, labels: Tensor, ignore_index: int, sizes: Sequence[int]) -> None:
    """Sums over micro-batches, divided by all live labels, are the mean of the whole batch: no mean of means."""
    live = int((labels[:, 1:] != ignore_index).sum())
    parts = zip(torch.split(logits, list(sizes)), torch.split(labels, list(sizes)), strict=True)
    total = sum(loss(*part, ignore_index=ignore_index, reduction="sum") for part in parts)
    tolerance, scale = rounding_of(logits)
    whole = loss(logits, labels, ignore_index=ignore_index)
    assert_same(
        torch.as_tensor(total) / max(live, 1), whole, f"loss in micro-batches of {list(sizes)}", tolerance, scale
    )


def first_label_is_irrelevant(loss: Loss, logits: Tensor, labels: Tensor, other_labels: Tensor) -> None:
    """Nothing predicts the first token, so its label has no effect."""
    edited = torch.cat((other_labels[:, :1], labels[:, 1:]), dim=1)
    assert_identical(loss(logits, edited), loss(logits, labels), "loss after an edit of the first labels")
