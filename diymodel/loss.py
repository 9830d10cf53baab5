"""Next-token cross-entropy.

Shapes: B batch, T sequence length, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel._compat import is_compiling


def next_token_loss(
    logits: Tensor, labels: Tensor, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Cross-entropy of each position's prediction with the token that comes next.

    The shift happens here: ``logits[:, t]`` is scored against ``labels[:, t + 1]``, so labels are given unshifted,
    usually ``input_ids`` with ``ignore_index`` at the padding. ``labels[:, 0]`` is predicted by nothing.

    Args:
        logits: (B, T, V). Half types are widened to float32.
        labels: (B, T) int64; ``ignore_index``, or token ids in [0, V).
        ignore_index: label that is not scored.
        reduction: "mean" over the scored labels (nats per token), or "sum", with which micro-batches add up to the
            whole batch: divide their total by :func:`num_scored` of the whole batch.

    Returns:
        A scalar. With no label to score it is 0, and so is its gradient: never NaN.

    Raises:
        ValueError: shapes, dtype or label values do not fit.
    """
    _check(logits, labels, ignore_index, reduction)
    wide = torch.promote_types(logits.dtype, torch.float32)
    # The labels are shifted, not the logits: those are V times as many, and would be copied.
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
    total = F.cross_entropy(
        logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total if reduction == "sum" else total / num_scored(labels, ignore_index).clamp(min=1)


def num_scored(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """How many labels (B, T) are scored after the shift: an int64 scalar tensor."""
    return (labels[:, 1:] != ignore_index).sum()


def _check(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: must be 'mean' or 'sum'")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be (batch, seq, vocab) and labels (batch, seq), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; labels are given unshifted, as long as the logits"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if is_compiling() or labels.is_meta or not labels.numel():
        return
    low, high = (int(bound) for bound in labels.masked_fill(labels == ignore_index, 0).aminmax())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"label {low if low < 0 else high} is neither a token id in [0, {logits.shape[-1]}) nor "
            f"ignore_index={ignore_index}"
        )
