"""Leaks that are told apart: two at once, one that begins in the second layer, one behind an attention of one's own."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.verify import check_causal_lm
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs
from tests.test_adapters import Tiny

JOINED = "att.transpose(1, 2).flatten(2)"
MIXED = "att.transpose(-2, -1).reshape(rows, length, width)"  # over all places, with one head as well


@pytest.mark.parametrize(("mask", "repaired"), [(True, False), (False, None)])
def test_no_mask_is_named_where_a_mask_alone_mends_nothing(mask: bool, repaired: bool | None) -> None:
    """As in abcllm's Llama, which was taken for a mean over the sequence."""
    base = BASES["kept"]
    source = base.source
    assert source.count(JOINED) == 1
    source = source.replace(JOINED, MIXED)
    if not mask:
        no_mask = next(bug for bug in list_bugs() if (bug.slug, bug.base) == ("bidirectional-mask", "kept"))
        source = no_mask.put_into(source)
    report = check_causal_lm(base.subject(source), profile="quick", only=["causality.edit", "causality.truncation"])
    assert report.symptoms["leak.in_attention"] is not mask
    assert report.symptoms.get("repair.causal_attention") is repaired
    assert (report.diagnosis[0].bug == "bidirectional-mask") is not mask
    assert "heads-mixed-by-reshape" in {found.bug for found in report.diagnosis[: 1 + (not mask)]}


class NeverSplit(Tiny):
    """Heads are put together that were never split (1ou2's llm-from-scratch): with one head as well, all is mixed."""

    def forward(self, idx: Tensor) -> Tensor:
        (B, T), x = idx.shape, self.embed(idx) + self.positions(torch.arange(idx.shape[1]))
        y = F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1), is_causal=True)
        return self.head(x + self.merged(y).view(B, T, -1))

    def merged(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).contiguous()


class Averaged(NeverSplit):
    """Nothing is mixed by views, and there is a mean over the sequence."""

    def merged(self, y: Tensor) -> Tensor:
        return y.flatten(0, 1).view(y.shape) + y.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("module", "by_a_view", "bug"),
    [(NeverSplit, True, "heads-mixed-by-reshape"), (Averaged, False, "statistic-over-sequence")],
)
def test_places_that_a_view_mixes_are_told_from_a_statistic(module: type[Tiny], by_a_view: bool, bug: str) -> None:
    report = check_causal_lm(module, profile="quick", only=["causality.*", "shape.*"])
    assert report.symptoms["leak.by_a_view"] is by_a_view
    assert report.symptoms["leak.outside_attention"]
    assert report.diagnosis[0].bug == bug
    assert report.diagnosis[0].score > 0.9


class Deep(nn.Module):
    """The first layer is causal, those after it are not."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.layers = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(config.num_layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = x + F.scaled_dot_product_attention(*layer(x).chunk(3, -1), is_causal=number == 0)
        return self.head(x)


def test_what_begins_in_the_second_layer_is_seen() -> None:
    report = check_causal_lm(Deep, profile="quick", only=["causality.edit", "causality.truncation"])
    (failure,) = {result.failure.config["num_layers"] for result in report.failed if result.failure is not None}
    assert failure == 2
    assert report.symptoms["leak.in_attention"]
    assert report.symptoms["leak.of_all_tokens"]
    assert report.diagnosis[0].bug == "bidirectional-mask"


def test_attention_is_seen_where_another_was_put_in_its_place() -> None:
    """As by what makes attention faster: F's name then stands for a function that calls torch's, or does not."""
    torchs = F.scaled_dot_product_attention

    def ahead(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return torchs(q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(1))

    with mock.patch.object(F, "scaled_dot_product_attention", ahead):
        report = check_causal_lm(Deep, profile="quick", only=["causality.edit", "causality.truncation"])
    assert report.symptoms["leak.in_attention"]
    assert not report.symptoms["leak.without_attention"]
    assert report.diagnosis[0].bug == "mask-sees-next-token"
