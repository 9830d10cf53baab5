"""Watchers, the repairs of layers, and what symptoms answer of a correct model."""

from __future__ import annotations

import contextlib
import fnmatch
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.randomness import seeded
from diymodel.verify.registry import list_checks
from diymodel.verify.repairs import CausalAttention
from diymodel.verify.repairs_layers import ROUTINGS, GateAndUpExchanged, OtherActivation, OtherRouting, ScaledScores
from diymodel.verify.report import Failure, Result
from diymodel.verify.symptoms import Patient, distinct_tokens, list_symptoms
from diymodel.verify.watchers import AttentionWeights, Choices, Overflows, SoftmaxesOverQueries
from diymodel.zoo.base import BASES

CONFIG: dict[str, Any] = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 16}
SEEN_IN_BUGS_ONLY = (  # experiments whose yes says that something is wrong
    *("attention.*", "batch.other_rows_matter", "compile.leaks", "leak.*", "packing.attention_keeps_apart"),
    *("padding.attended_without_cache", "paths.*", "sensitivity.blind_to_own_token", "shape.nan_for_one_token"),
    *("window.*", "reference.joins_heads_otherwise", "repair.scaled_scores", "repair.other_*"),
)
NEEDS_ITS_FAILURE = ("leak.in_gradients_only", "leak.with_dropout_only")


def patient(base: str) -> Patient:
    """A correct model of which some failure is told."""
    check = next(check for check in list_checks() if check.id == "causality.in_training")
    failure = Failure("told", (), CONFIG, {}, "")
    subject = BASES[base].subject()
    found = Patient(subject, {}, "cpu")
    found.failed = {"other": Result(check, "failed", failure=failure)}
    subject.reference = lambda config, state, ids: found.lm(**config.to_dict()).logits(ids)
    return found


@pytest.mark.parametrize("base", ["rotary", "hub", "plain", "alibi", "fastlike", "switch", "windowed", "packed"])
def test_a_correct_model_shows_none_of_them(base: str) -> None:
    found, shown, asked = patient(base), [], 0
    for id, symptom in list_symptoms().items():
        if id in NEEDS_ITS_FAILURE or not any(fnmatch.fnmatchcase(id, glob) for glob in SEEN_IN_BUGS_ONLY):
            continue
        with seeded(), contextlib.suppress(Exception):  # what the model has not: a cache, packing, a mask
            answer = symptom.ask(found)
            asked += 1
            if answer:
                shown.append(id)
    assert not shown
    assert asked > 15


@pytest.mark.parametrize("base", ["rotary", "hub", "plain", "headwise", "experts", "scribe"])
def test_a_watcher_changes_nothing(base: str) -> None:
    lm = patient(base).lm()
    ids = distinct_tokens(lm)
    expected = lm.logits(ids)
    weights: list[Tensor] = []
    for watcher in (
        partial(AttentionWeights, weights),
        partial(Choices, []),
        partial(SoftmaxesOverQueries, []),
        lambda start, length: Overflows(),
    ):
        lm.around = watcher
        torch.testing.assert_close(lm.logits(ids), expected, rtol=0, atol=1e-12)
    assert weights
    for seen in weights:
        torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen[..., 0]))
        assert not seen.triu(1).any()


def test_weights_are_those_of_every_kind_of_attention() -> None:
    q, k = torch.randn(2, 1, 2, 3, 4)
    expected = (q @ k.transpose(2, 3) / 2).softmax(-1)
    seen: list[Tensor] = []
    with AttentionWeights(seen, 0, 3):
        F.scaled_dot_product_attention(q, k, k)
        (q @ k.transpose(2, 3) / 2).softmax(-1)
    torch.testing.assert_close(seen, [expected, expected])


def test_a_cache_with_room_is_masked_from_where_its_tokens_are() -> None:
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 6, 4)
    seen: list[Tensor] = []
    with AttentionWeights(seen, 1, 2), CausalAttention(1, 2):
        F.scaled_dot_product_attention(q, k, k)
    assert [weights.shape[-1] for weights in seen] == [3]


@pytest.mark.parametrize(("operation", "first"), [("square", "square"), ("scores", "scores")])
def test_what_overflows_first(operation: str, first: str) -> None:
    x = torch.full((4, 4), 400.0, dtype=torch.float16)
    with Overflows() as seen:
        _ = x.pow(2).mean(-1) if operation == "square" else (x @ x.T).softmax(-1)
    assert seen.first == first


def test_scores_are_scaled_and_hidden_ones_stay_hidden() -> None:
    q, k = torch.randn(2, 1, 1, 3, 4)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=1.0)
    least = torch.finfo(q.dtype).min
    with ScaledScores(2.0, 0, 3):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, attn_mask=mask), expected)
        scores = (q @ k.transpose(2, 3) / 2).masked_fill(~mask, least)
        torch.testing.assert_close(scores.softmax(-1) @ k, expected)


def test_activations_are_exchanged() -> None:
    gate, up = torch.randn(2, 5)
    with OtherActivation("silu", "gelu", 0, 5):
        assert torch.equal(F.silu(gate), torch.ops.aten.gelu(gate))
        assert torch.equal(F.relu(gate), gate.clamp(min=0))
    with GateAndUpExchanged(0, 5):
        product = F.silu(gate) * up
    torch.testing.assert_close(product, F.silu(up) * gate)


def test_chosen_experts_are_weighed_otherwise() -> None:
    scores = torch.randn(2, 3, 4)
    softmax_to_one = next(rule for rule in ROUTINGS if rule[0] is not rule[1] and rule[1](torch.ones(2))[0] == 0.5)
    with OtherRouting(*softmax_to_one, 0, 3):
        values, chosen = torch.sigmoid(scores).topk(2)
    probabilities = scores.softmax(-1).gather(-1, chosen)
    torch.testing.assert_close(values, probabilities / probabilities.sum(-1, keepdim=True))
