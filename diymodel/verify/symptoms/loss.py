"""Which formula a loss is.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.convention import IGNORED
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_LOSS = ("loss.*", "training.*")


_PADDING = 1
_Formula = Callable[[Tensor, Tensor], Tensor]


def _is_formula(patient: Patient, formulas: Iterable[_Formula]) -> bool | None:
    """Whether the module's own loss is what one of ``formulas`` makes of logits (B, T, V) and labels (B, T)."""
    lm = patient.lm(pad_token_id=_PADDING)
    ids = distinct_tokens(lm, rows=2)
    labels = ids.clone()
    if patient.subject.missing("labels") is None:
        labels = ids.flip(1).clone()
        labels[0, 2:4] = IGNORED
        labels[1, 2], labels[1, -1] = _PADDING, 0
    seen, logits = float(lm.loss(ids, labels).detach()), lm.logits(ids).detach().double()

    def is_loss(formula: _Formula) -> bool:
        value = float(formula(logits, labels))
        return abs(seen - value) <= 1e-6 * abs(value)

    return any(map(is_loss, formulas)) and not is_loss(_right)


def _entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return _entropy(logits[:, :-1], labels[:, 1:])


def _with_ignored(last: bool, over_live: bool) -> _Formula:
    """Ignored labels scored as token 0, with that of the last position or not, over the live labels or all."""

    def formula(logits: Tensor, labels: Tensor) -> Tensor:
        labels = F.pad(labels[:, 1:], (0, int(last)), value=IGNORED)
        total = _entropy(logits[:, : labels.shape[1]], labels.clamp(min=0), "sum")
        return total / (int((labels != IGNORED).sum()) if over_live else labels.numel())

    return formula


def _formula(id: str, yes: str, yes_zh: str, cause: str, *formulas: _Formula) -> None:
    symptom(f"loss.is_{id}", yes, yes_zh, _LOSS, (cause,))(lambda patient: _is_formula(patient, formulas))


_formula(
    "unshifted",
    "the loss is that of each position predicting its own token",
    "loss 是每个位置预测它自己",
    "labels-not-shifted",
    _entropy,
    lambda logits, labels: _entropy(logits, labels, "sum") / labels.numel(),
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, :-1]),
)
_formula(
    "shifted_twice",
    "the loss is that of each position predicting the token after the next",
    "loss 是每个位置预测再下一个 token",
    "labels-shifted-twice",
    lambda logits, labels: _entropy(logits[:, :-2], labels[:, 2:]),
)
_formula(
    "flattened_first",
    "the loss is that of rows laid end to end, the last position of one predicting the first token of the next",
    "loss 是各行首尾相接算出来的：上一行末尾预测下一行开头",
    "labels-flattened-before-shift",
    lambda logits, labels: _entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:]),
)
_formula(
    "over_all_positions",
    "the sum of the losses is divided by all positions, the ignored ones as well",
    "loss 之和除以了所有位置，连被忽略的也算",
    "loss-wrong-denominator",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:], "sum") / labels[:, 1:].numel(),
)
_formula(
    "over_all_tokens",
    "the sum of the losses is divided by all tokens, the first and the ignored ones as well",
    "loss 之和除以了所有 token，连第一个和被忽略的也算",
    "loss-wrong-denominator",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:], "sum") / labels.numel(),
)
_formula(
    "mean_of_rows",
    "each row is averaged by itself, and then the rows",
    "先在每一行内平均，再对各行平均",
    "accumulation-mean-of-means",
    lambda logits, labels: torch.stack(
        [_entropy(logits[row, :-1], labels[row, 1:]) for row in range(len(labels))]
    ).mean(),
)
_formula(
    "with_ignored",
    "ignored labels are scored as token 0",
    "被忽略的标签被当成 token 0 计分",
    "ignore-index-not-honoured",
    *(_with_ignored(last, over_live) for last in (False, True) for over_live in (False, True)),
)
_formula(
    "without_token_0",
    "labels of token 0 are not scored",
    "标签为 token 0 的位置没有计分",
    "ignore-index-not-honoured",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] == 0, IGNORED)),
)
_formula(
    "without_padding_tokens",
    "labels that equal the padding token are not scored",
    "等于 padding token 的标签没有计分",
    "pad-equals-eos-masked",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] == _PADDING, IGNORED)),
)
