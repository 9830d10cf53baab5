"""Repairs and watchers leave a correct model as it is, and do what they say to one operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.experiments.handing import Calls, handed, right_mask, right_positions
from diymodel.verify.experiments.repairs import (
    CachedKeysAsHeld,
    CausalAttention,
    NoDropout,
    PositionsAfterTheCache,
    PositionsOfTokensSeen,
    Repair,
    SoftmaxOverKeys,
)
from diymodel.verify.experiments.repairs_layers import (
    ROUTINGS,
    GateAndUpExchanged,
    OtherActivation,
    OtherRouting,
    ScaledScores,
)
from diymodel.verify.experiments.watchers import AttentionWeights, Choices, Overflows, SoftmaxesOverQueries
from diymodel.verify.symptoms import distinct_tokens
from diymodel.zoo.base import BASES

REPAIRS = (CausalAttention, NoDropout, PositionsAfterTheCache, PositionsOfTokensSeen, SoftmaxOverKeys)


def correct(base: str, num_layers: int = 1) -> LM:
    """A correct model of the zoo."""
    subject = BASES[base].subject()
    config = DIYConfig(vocab_size=16, num_layers=num_layers, hidden_size=8, num_heads=2, max_seq_len=16, dropout=0.0)
    return LM(subject.build(config).double().eval(), config, subject.convention)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("base", ["rotary", "hub", "alibi", "nanogpt", "learned"])
def test_a_repair_changes_nothing_in_a_correct_model(repair: type[Repair], base: str) -> None:
    lm = correct(base, num_layers=2)
    ids = torch.arange(6)[None]
    expected = lm.logits(ids)
    lm.around = repair
    torch.testing.assert_close(lm.logits(ids), expected)
    if "cache" not in lm.convention.missing:
        _, past = lm.extend(ids[:, :4])
        torch.testing.assert_close(lm.extend(ids[:, 4:5], past)[0][:, -1], expected[:, 4])


def test_a_softmax_over_queries_is_repaired() -> None:
    scores = torch.randn(1, 2, 3, 3)
    with SoftmaxOverKeys(0, 3):
        assert torch.equal(F.softmax(scores, dim=-2), scores.softmax(-1))


def test_attention_without_a_mask_is_made_causal() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with CausalAttention(0, 3):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)
        torch.testing.assert_close((q @ k.transpose(2, 3) / 2).softmax(-1) @ v, expected)


def test_positions_that_restart_are_moved() -> None:
    table = torch.arange(40).view(10, 4)
    with PositionsAfterTheCache(5, 2):
        assert torch.arange(2).tolist() == [5, 6]
        assert torch.arange(7).tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert torch.equal(table[:2], table.narrow(0, 5, 2))
        assert torch.equal(table[:2, None], table.narrow(0, 5, 2)[:, None])
        assert table[1:3, 0].tolist() == [4, 8]


def test_positions_of_earlier_tokens_are_moved_at_one_place_or_all() -> None:
    places: set[tuple[str, int]] = set()
    with PositionsOfTokensSeen(5, 2, found=places):
        assert torch.arange(2, 4).tolist() == [5, 6]
        assert torch.arange(0, 2).tolist() == [0, 1]
        assert torch.arange(5, 7).tolist() == [5, 6]
        assert torch.arange(2, 6, 2).tolist() == [2, 4]
    with PositionsOfTokensSeen(5, 2, only=("elsewhere", 1)):
        assert torch.arange(2, 4).tolist() == [2, 3]
    assert [file for file, _ in places] == [__file__]


def test_only_turned_keys_are_put_back() -> None:
    held, new = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    with CachedKeysAsHeld(3, 1, [held]):
        assert torch.cat((held.flip(-1), new), 2).equal(torch.concat((held, new), 2))
        assert torch.cat((2 * held, new), 2)[:, :, :3].equal(2 * held)
    with CachedKeysAsHeld(3, 1, [torch.stack((new.expand_as(held), held))]):  # several layers in one tensor
        assert torch.cat((held.flip(-1), new), 2)[:, :, :3].equal(held)


@pytest.mark.parametrize("change", [right_positions, right_mask])
@pytest.mark.parametrize("base", ["writer", "scribe"])
def test_a_correct_generate_hands_over_the_right_positions_and_mask(base: str, change: Callable[..., None]) -> None:
    lm = correct(base)
    ids = torch.arange(8).view(2, 4)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    real = real.flip(1) if lm.generating.pads_left else real
    expected = lm.greedy(ids, 4, real)
    calls = Calls(lm, real)
    with handed(lm, lambda arguments: change(calls, arguments)):
        assert torch.equal(lm.greedy(ids, 4, real), expected)
    assert calls.number == 4
    assert torch.equal(lm.greedy(ids, 4, real), expected)
    assert calls.number == 4, "the hook is still there"


@pytest.mark.parametrize("base", ["rotary", "hub", "plain", "headwise", "experts", "scribe"])
def test_a_watcher_changes_nothing(base: str) -> None:
    lm = correct(base)
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
