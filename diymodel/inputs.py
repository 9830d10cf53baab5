"""What the model refuses before any work: nothing is clamped or truncated in silence.

Shapes: B batch, T query length. All functions raise ValueError with the numbers and the likely cause.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diymodel._compat import is_compiling


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuse what is not a (B, T) batch of tokens of the vocabulary."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise ValueError(
            f"input_ids must be int64 token ids of shape (batch, seq) with at least one token, got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if not _readable(input_ids):
        return
    if input_ids.numel() == 1:  # a decode step: a kernel for one number costs a tiny model 3 % of it
        low = high = int(input_ids)
    else:
        low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary [0, {vocab_size})")


def check_seq_lengths(seq_lengths: Tensor, input_ids: Tensor) -> None:
    """Refuse what does not count the real tokens of each row."""
    B, T = input_ids.shape
    if seq_lengths.shape != (B,) or seq_lengths.dtype != torch.int64 or seq_lengths.device != input_ids.device:
        raise ValueError(
            f"seq_lengths must be int64 of shape ({B},) on {input_ids.device}, got {seq_lengths.dtype} of shape "
            f"{tuple(seq_lengths.shape)} on {seq_lengths.device}"
        )
    if _readable(seq_lengths) and (int(seq_lengths.min()) < 0 or int(seq_lengths.max()) > T):
        raise ValueError(f"seq_lengths {seq_lengths.tolist()} must be between 0 and the {T} tokens of a row")


def check_logits_to_keep(logits_to_keep: int, input_ids: Tensor, seq_lengths: Tensor | None) -> None:
    """Refuse to keep more positions than the shortest row has."""
    shortest = input_ids.shape[1] if seq_lengths is None else int(seq_lengths.min())
    if not 0 <= logits_to_keep <= shortest:
        raise ValueError(
            f"logits_to_keep={logits_to_keep} must be 0 (all) or at most the {shortest} tokens of the shortest row"
        )


def seq_lengths_of(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Real tokens of each row, (B,) int64, from a mask (B, T) of 1 for a token and 0 for padding on the right."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}; "
            "with a cache it covers the new tokens only"
        )
    mask = attention_mask == 1
    if not torch.equal(mask, attention_mask != 0):
        raise ValueError("attention_mask must hold 1 for tokens and 0 for padding; this one has other values")
    rising = (mask[:, 1:] > mask[:, :-1]).any(dim=1)
    if rising.any():
        row = int(rising.nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} is {mask[row].int().tolist()}: a 1 follows a 0, and this model takes padding on "
            "the right only; move each row's tokens to the front"
        )
    return mask.sum(dim=1)


def _readable(ids: Tensor) -> bool:
    """Values can be looked at: not while compiling, nor on the meta device, which has none."""
    return not (is_compiling() or ids.is_meta)
