"""Finds the loss of a module that takes no labels: a switch asks for that of its ids, which it shifts itself.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.uncallable import sample_ids
from diymodel.verify.convention import IGNORED, Convention
from diymodel.verify.failure import SubjectError, said

_LENGTH = 6  # of rows that hold every token of a small vocabulary
_SCALARS = 4  # that forward may return: a loss and what it is made of
_ROUNDING = 1e-4


def _entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)


_MISTAKES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (  # of logits (B, T, V) and ids (B, T)
    _entropy,
    lambda logits, ids: _entropy(logits[:, :-1], ids[:, :-1]),
    lambda logits, ids: _entropy(logits[:, :-2], ids[:, 2:]),
    lambda logits, ids: _entropy(logits.flatten(0, 1)[None, :-1], ids.flatten()[None, 1:]),
    lambda logits, ids: _entropy(logits[:, :-1], ids[:, 1:], "sum"),
)


def find_loss_of_ids(module: nn.Module, config: DIYConfig, convention: Convention) -> tuple[Convention, dict[str, str]]:
    """Which scalar is the loss, and which token it passes over, such as padding.

    A loss that is none is left alone, but for the usual mistakes: with no labels of one's own to try, a further term
    in it looks like any other mistake.
    """
    call = f"forward({convention.loss_switch}=True)"
    if convention.shortest > 1:
        return convention, {"loss": f"{call} leaves out a token, and no fewer than {convention.shortest} are taken"}
    ids = sample_ids(config, _LENGTH).flip(1)
    ids[-1, -1] = config.vocab_size - 1  # which text may end with
    try:
        ways = _ways(LM(module, config, convention), ids)
    except SubjectError as error:
        return convention, {"loss": str(error)}
    except Exception as error:  # a stranger's forward may raise anything
        return convention, {"loss": f"{call} gave no loss: {said(error)}"}
    no_labels = {"labels": f"{call} gives the loss of its ids, and takes no labels"}
    for way in ways:
        if _is_cross_entropy(LM(module, config, way), ids):
            return way, no_labels
    for way in ways:
        for token in sorted({*ids[:, 1:].flatten().tolist()}):
            passing_over = replace(way, ignore_index=token)
            if _is_cross_entropy(LM(module, config, passing_over), ids):
                return passing_over, no_labels
    for way in ways:
        lm = LM(module, config, way)
        loss, logits = lm.loss(ids, ids).double(), lm.logits(ids).double()
        if any(_close(loss, mistake(logits, ids)) for mistake in _MISTAKES):
            return way, no_labels
    why = f"{call} is not the mean cross-entropy of the next tokens: it may hold a further term, which only labels of "
    return convention, {"loss": f"{why}one's own could tell from a mistake; write Subject(…, loss=…)"}


def _ways(lm: LM, ids: Tensor) -> list[Convention]:
    """The scalars that may be it."""
    ways = [replace(lm.convention, loss_place=place) for place in range(_SCALARS)]
    losses = [LM(lm.module, lm.config, way).loss(ids, ids) for way in ways]
    return [way for place, way in enumerate(ways) if place == 0 or not losses[place].equal(losses[place - 1])]


def _is_cross_entropy(lm: LM, ids: Tensor) -> bool:
    labels = ids.masked_fill(ids == lm.convention.ignore_index, IGNORED)
    loss = lm.loss(ids, labels).double()
    return _close(loss, loss - lm.beside_cross_entropy(ids, labels))


def _close(loss: Tensor, expected: Tensor) -> bool:
    return abs(float(loss - expected)) <= _ROUNDING * abs(float(expected))
