"""Our loss and parameter count, written from the definitions in plain Python: slow, and meant to be obviously right.

The model itself has its oracle in ``diymodel/verify/reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diymodel.config import DIYConfig
from diymodel.verify.reference import Matrix, softmax


def oracle_loss(
    logits: Sequence[Sequence[Sequence[float]]], labels: Sequence[Sequence[int]], ignore_index: int = -100
) -> tuple[float, list[Matrix]]:
    """Mean next-token cross-entropy over the scored labels, and its gradient with respect to every logit.

    Position t is scored against label t + 1. With no label to score, value and gradient are 0.
    """
    scored = sum(label != ignore_index for row in labels for label in row[1:])
    value = 0.0
    gradient = [[[0.0] * len(scores) for scores in row] for row in logits]
    for row, row_labels in enumerate(labels):
        for position, label in enumerate(row_labels[1:]):
            if label == ignore_index:
                continue
            scores = list(logits[row][position])
            largest = max(scores)
            value += (largest + math.log(sum(math.exp(score - largest) for score in scores)) - scores[label]) / scored
            for token, probability in enumerate(softmax(scores)):
                gradient[row][position][token] = (probability - (token == label)) / scored
    return value, gradient


def oracle_num_parameters(config: DIYConfig) -> int:
    """Weights of the architecture, a shared one counted once."""
    heads = config.num_heads + 2 * config.kv_heads  # q, k and v
    attention = (heads + config.num_heads) * config.head_size * config.hidden_size
    mlp = 3 * config.mlp_size * config.hidden_size  # gate, up and down
    norms = 2 * config.hidden_size
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return embeddings + config.num_layers * (attention + mlp + norms) + config.hidden_size
