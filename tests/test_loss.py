"""What next_token_loss refuses; its value and gradient are held to the oracle in tests/properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diymodel import next_token_loss
from diymodel.loss import num_scored

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
        ({"reduction": "none"}, "reduction='none': must be 'mean' or 'sum'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next_token_loss(**{"logits": LOGITS, "labels": LABELS} | arguments)


def test_the_first_label_and_the_ignored_are_not_scored() -> None:
    assert num_scored(LABELS) == 3
    assert num_scored(LABELS, ignore_index=1) == 3
    assert num_scored(LABELS[:, :1]) == 0


def test_a_single_token_has_nothing_to_predict() -> None:
    logits = torch.zeros(2, 1, 5, requires_grad=True)
    loss = next_token_loss(logits, LABELS[:, :1])
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss = next_token_loss(logits, LABELS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(logits.float(), LABELS))
