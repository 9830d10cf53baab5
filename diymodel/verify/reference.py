"""An independent implementation of our model, in plain Python loops over float64 numbers: slow, and obviously right.

Properties such as "cached equals uncached" cannot see a mistake that is made on both paths (a wrong attention scale,
another pairing of rotary halves, another order of grouped heads). This can: it is written from the definitions and
shares no code with diymodel's model. Torch appears only to read weights and to return logits.

A vector is a list of floats, a matrix a list of its rows.

Shapes: B batch, T sequence length, V vocabulary; H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diymodel.config import DIYConfig

Vector = list[float]
Matrix = list[Vector]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(matrix: Matrix, vector: Vector) -> Vector:
    """``matrix · vector``: what a bias-free linear layer with this weight does."""
    return [dot(row, vector) for row in matrix]


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def softmax(scores: Vector) -> Vector:
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def rms_norm(x: Vector, weight: Vector, eps: float) -> Vector:
    """``weight · x / sqrt(mean(x²) + eps)``."""
    scale = 1 / math.sqrt(dot(x, x) / len(x) + eps)
    return [w * value * scale for w, value in zip(weight, x, strict=True)]


def rotate(x: Vector, position: int, theta: float) -> Vector:
    """Turn the pair ``(x[i], x[i + D/2])`` by the angle ``position · theta^(-2i/D)``."""
    half = len(x) // 2
    turned = list(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        first, second = x[i], x[i + half]
        turned[i] = first * math.cos(angle) - second * math.sin(angle)
        turned[i + half] = first * math.sin(angle) + second * math.cos(angle)
    return turned


def attend(query: Vector, keys: Matrix, values: Matrix) -> Vector:
    """One head of one position: the average of the values, weighted by softmax(query · key / sqrt(D))."""
    weights = softmax([dot(query, key) / math.sqrt(len(query)) for key in keys])
    return [sum(weight * value[i] for weight, value in zip(weights, values, strict=True)) for i in range(len(query))]


def swiglu(x: Vector, gate_up: Matrix, down: Matrix) -> Vector:
    """``down(silu(gate(x)) · up(x))``; the rows of ``gate_up`` are those of gate, then those of up."""
    half = len(gate_up) // 2
    gates, ups = times(gate_up[:half], x), times(gate_up[half:], x)
    return times(down, [gate / (1 + math.exp(-gate)) * up for gate, up in zip(gates, ups, strict=True)])


def attention(normed: Matrix, qkv: Matrix, out: Matrix, config: DIYConfig) -> Matrix:
    """Causal grouped-query attention over a whole row; the rows of ``qkv`` are q heads, then k heads, then v heads."""
    H, K, D = config.num_heads, config.kv_heads, config.head_size
    queries: list[Matrix] = []  # [position][head], rotated
    keys: list[Matrix] = []
    values: list[Matrix] = []
    for position, x in enumerate(normed):
        projected = times(qkv, x)
        heads = [projected[start : start + D] for start in range(0, len(projected), D)]
        queries.append([rotate(head, position, config.rope_theta) for head in heads[:H]])
        keys.append([rotate(head, position, config.rope_theta) for head in heads[H : H + K]])
        values.append(heads[H + K :])
    attended: Matrix = []
    for position in range(len(normed)):
        joined: Vector = []
        for head in range(H):
            shared = head // (H // K)  # the key head that this query head reads
            visible = range(position + 1)
            joined += attend(
                queries[position][head], [keys[p][shared] for p in visible], [values[p][shared] for p in visible]
            )
        attended.append(times(out, joined))
    return attended


def logits_of_row(config: DIYConfig, state_dict: Mapping[str, Tensor], tokens: Sequence[int]) -> Matrix:
    """Logits [position][token] of one unpadded row."""

    def vector(name: str) -> Vector:
        return [float(value) for value in state_dict[name]]

    def matrix(name: str) -> Matrix:
        return [[float(value) for value in row] for row in state_dict[name].tolist()]

    embedding = matrix("model.embed_tokens.weight")
    stream = [embedding[token] for token in tokens]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        norm = vector(prefix + "input_layernorm.weight")
        normed = [rms_norm(x, norm, config.rms_norm_eps) for x in stream]
        qkv, out = matrix(prefix + "self_attn.qkv_proj.weight"), matrix(prefix + "self_attn.o_proj.weight")
        stream = [add(x, update) for x, update in zip(stream, attention(normed, qkv, out, config), strict=True)]
        norm = vector(prefix + "post_attention_layernorm.weight")
        gate_up, down = matrix(prefix + "mlp.gate_up_proj.weight"), matrix(prefix + "mlp.down_proj.weight")
        stream = [add(x, swiglu(rms_norm(x, norm, config.rms_norm_eps), gate_up, down)) for x in stream]
    norm = vector("model.norm.weight")
    head = embedding if config.tie_word_embeddings else matrix("lm_head.weight")
    return [times(head, rms_norm(x, norm, config.rms_norm_eps)) for x in stream]


def reference_logits(config: DIYConfig, state_dict: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """Logits (B, T, V) of unpadded rows, in float64 on the CPU."""
    rows = [logits_of_row(config, state_dict, row) for row in input_ids.tolist()]
    return torch.tensor(rows, dtype=torch.float64)
