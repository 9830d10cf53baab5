"""The reference that our model is held to, against values computed by hand.

That the model gives its logits is checked by the harness: reference.logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diymodel import DIYConfig
from diymodel.verify import reference


def test_rms_norm() -> None:
    assert reference.rms_norm([3.0, 4.0], [1.0, 2.0], 0.0) == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])
    assert reference.rms_norm([0.0, 2.0], [1.0, 1.0], 2.0) == pytest.approx([0.0, 1.0])  # sqrt(4/2 + 2) = 2


def test_rotate_turns_pairs_half_a_head_apart() -> None:
    # Angles at position 100, theta 10000: 100 for pair (0, 2), and 100 · 10000^(-1/2) = 1 for pair (1, 3).
    turned = reference.rotate([1.0, 1.0, 0.0, 0.0], 100, 10000.0)
    assert turned == pytest.approx([math.cos(100), math.cos(1), math.sin(100), math.sin(1)])
    assert reference.rotate([1.0, 2.0], 0, 10000.0) == [1.0, 2.0]


def test_rotation_depends_on_the_distance_only() -> None:
    query, key = [0.3, -1.2, 0.7, 2.0], [1.1, 0.4, -0.5, 0.9]
    near = reference.dot(reference.rotate(query, 5, 10.0), reference.rotate(key, 2, 10.0))
    far = reference.dot(reference.rotate(query, 8, 10.0), reference.rotate(key, 5, 10.0))
    assert near == pytest.approx(far)


def test_attend() -> None:
    # Scores ln 3 and 0 after the division by sqrt(4) = 2: weights 3/4 and 1/4.
    keys = [[2 * math.log(3), 0.0, 0.0, 0.0], [0.0] * 4]
    assert reference.attend([1.0, 0.0, 0.0, 0.0], keys, [[4.0] * 4, [8.0] * 4]) == pytest.approx([5.0] * 4)


def test_swiglu() -> None:
    # gate = x, up = 2x, down = 1: silu(1) · 2.
    assert reference.swiglu([1.0], [[1.0], [2.0]], [[1.0]]) == pytest.approx([2 / (1 + math.exp(-1))])


def test_softmax_of_large_scores() -> None:
    assert reference.softmax([1000.0, 1000.0]) == [0.5, 0.5]


CONFIG = DIYConfig(
    vocab_size=2, num_layers=1, hidden_size=2, num_heads=1, max_seq_len=4, intermediate_size=1, rms_norm_eps=1e-30
)


def hand_made_state(value_weight: float) -> dict[str, Tensor]:
    """Tokens 0 and 1 are the unit vectors, queries and keys are 0, values are scaled tokens, the MLP adds nothing."""
    identity = torch.eye(2)
    return {
        "model.embed_tokens.weight": identity,
        "model.layers.0.input_layernorm.weight": torch.ones(2),
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat((torch.zeros(4, 2), value_weight * identity)),
        "model.layers.0.self_attn.o_proj.weight": identity,
        "model.layers.0.post_attention_layernorm.weight": torch.ones(2),
        "model.layers.0.mlp.gate_up_proj.weight": torch.ones(2, 2),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(2, 1),
        "model.norm.weight": torch.ones(2),
        "lm_head.weight": torch.tensor([[1.0, 0.0], [0.0, 3.0]]),
    }


def test_logits_without_attention() -> None:
    # RMSNorm of a unit vector of two components is sqrt(2) times it; the head triples the second component.
    logits = reference.logits_of_row(CONFIG, hand_made_state(0.0), [0, 1])
    assert logits == [pytest.approx([math.sqrt(2), 0.0]), pytest.approx([0.0, 3 * math.sqrt(2)])]


def test_logits_with_uniform_attention() -> None:
    # Values are 1/sqrt(2) · sqrt(2) · token = token. Position 0 gets (1, 0) + (1, 0); position 1 gets (0, 1) + the mean
    # (1/2, 1/2) of both tokens = (1/2, 3/2), whose root mean square is sqrt(5)/2.
    logits = reference.logits_of_row(CONFIG, hand_made_state(1 / math.sqrt(2)), [0, 1])
    assert logits[0] == pytest.approx([math.sqrt(2), 0.0], rel=1e-6)
    assert logits[1] == pytest.approx([1 / math.sqrt(5), 9 / math.sqrt(5)], rel=1e-6)


def test_tied_logits_use_the_embedding() -> None:
    tied = DIYConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": True})
    assert reference.logits_of_row(tied, hand_made_state(0.0), [1]) == [pytest.approx([0.0, math.sqrt(2)])]
