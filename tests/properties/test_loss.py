"""The properties of ``loss.py`` on our loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diymodel import next_token_loss
from tests.properties import loss
from tests.properties.strategies import MAX_LENGTH, SEEDS, label_masks, splits

IGNORE = st.sampled_from((-100, -1, 0, 2))  # also an index that is a token: its label is ignored like any other


@st.composite
def scored(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, int]:
    """Logits, labels and ignore index."""
    B, T, V = draw(st.integers(1, 4)), draw(st.integers(1, MAX_LENGTH)), draw(st.integers(3, 6))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    logits = 3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    ignore_index = draw(IGNORE)
    return logits.to(dtype), labels.where(draw(label_masks(B, T)), ignore_index), ignore_index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
def test_value_and_gradient_equal_the_oracle(dtype: torch.dtype, data: st.DataObject) -> None:
    loss.value_and_gradient_equal_the_oracle(next_token_loss, *data.draw(scored(dtype), "logits, labels, ignore"))


@given(batch=scored(), data=st.data())
def test_micro_batches_add_up(batch: tuple[Tensor, Tensor, int], data: st.DataObject) -> None:
    loss.micro_batches_add_up(next_token_loss, *batch, data.draw(splits(len(batch[0])), "sizes"))


@given(batch=scored(), seed=SEEDS)
def test_first_label_is_irrelevant(batch: tuple[Tensor, Tensor, int], seed: int) -> None:
    logits, labels, ignore_index = batch
    labels = labels.masked_fill(labels == ignore_index, -100)
    other_labels = torch.randint(logits.shape[-1], labels.shape, generator=torch.Generator().manual_seed(seed))
    loss.first_label_is_irrelevant(next_token_loss, logits, labels, other_labels)
