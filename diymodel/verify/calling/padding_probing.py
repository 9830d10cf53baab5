"""Finds how padding is told, and several documents in a row, by trying.

Shapes: B batch, T query length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_probing import close
from diymodel.verify.calling.signature import has_no, parameter_names
from diymodel.verify.calling.uncallable import LENGTH, ROWS
from diymodel.verify.convention import Convention
from diymodel.verify.failure import refusal

_MARKS_REAL = ("attention_mask",)  # the one name that everybody gives the same meaning
_MASK_KINDS = ((torch.int64, False), (torch.bool, False), (torch.bool, True))  # dtype, True at padding


def find_padding(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor, declared: Mapping[str, Any]
) -> tuple[Convention, dict[str, str]]:
    """How padding on the right is told: by lengths, or by a mask of numbers or booleans, of what is real or is not."""
    if not (convention.lengths or convention.mask):
        convention = _with_padding_mask(module, config, convention, ids)
    name = convention.lengths or convention.mask
    if name is None:
        why = has_no(module, "attention_mask and no seq_lengths")
        return convention, dict.fromkeys(("padding", "ragged_cache"), why)
    ways = [convention]
    if not (convention.lengths or {"mask_dtype", "mask_marks_padding"} & declared.keys()):
        ways = mask_kinds(convention)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH]] + [[2]] * (ROWS - 1))
    expected = LM(module, config, convention).logits(ids)[real]
    accepted: list[Convention] = []
    reasons = []
    for way in ways:
        lm = LM(module, config, way)
        if (refused := refusal(lm.logits, ids, real)) is not None:
            reasons.append(refused)
        elif close(lm.logits(ids, real)[real], expected):
            accepted.insert(0, way)
            break
        else:
            accepted.append(way)
    if not accepted:
        why = f"forward({name}=…) takes no padding on the right: {reasons[0]}"
        return convention, dict.fromkeys(("padding", "ragged_cache"), why)
    found, missing = accepted[0], {}
    if not found.lengths:
        untold = LM(module, config, replace(found, positions=None))
        found = replace(found, pads_left=_pads_left(LM(module, config, found), ids))
        may_be_left_out = bool(found.positions) and not found.cache_on_module  # or they say where its cache goes on
        found = replace(found, pads_left_untold=may_be_left_out and _pads_left(untold, ids))
    if not (convention.lengths or convention.positions):
        missing["ragged_cache"] = "forward has no seq_lengths and no position_ids to continue short rows by"
    return found, missing


def _pads_left(lm: LM, ids: Tensor) -> bool:
    """Whether rows padded on the left give what they give alone."""
    shortest = lm.convention.shortest
    real = torch.arange(LENGTH) >= LENGTH - torch.arange(shortest, shortest + ROWS)[:, None]
    if shortest + ROWS > LENGTH or refusal(lm.logits, ids, real) is not None:
        return False
    padded = lm.logits(ids, real)
    return all(
        close(padded[row : row + 1, hidden:], lm.logits(ids[row : row + 1, hidden:]))
        for row, hidden in enumerate((~real).sum(1).tolist())
    )


def _with_padding_mask(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """With attn_mask, or another name of causal masks (T, S), where given as (B, T) it hides what it marks."""
    name = None if convention.causal or convention.block_mask else parameter_names(module).get("causal")
    if name is None:
        return convention
    ways = mask_kinds(replace(convention, mask=name))
    return next((way for way in ways if _hides(LM(module, config, way), ids)), convention)


def _hides(lm: LM, ids: Tensor) -> bool:
    """Whether a mask keeps the first token of the first row from the others, and changes nothing in other rows."""
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 0] = False
    other = ids.clone()
    other[0, 0] = ids[0, 1]
    if refusal(lm.logits, ids, real) is not None:
        return False
    hidden, seen = lm.logits(ids, real), lm.logits(ids)
    changed = not close(hidden[0, 1:], seen[0, 1:])
    return changed and close(lm.logits(other, real)[0, 1:], hidden[0, 1:]) and close(hidden[1:], seen[1:])


def padded_is_finite(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether a row padded on the left has finite logits; True where no such row is taken.

    Where a mask holds float64's smallest number and the softmax works in float32, that number is -inf.
    """
    if not convention.mask or "padding" in convention.missing:
        return True
    lm = LM(module, config, convention)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 0] = False
    return refusal(lm.logits, ids, real) is not None or bool(lm.logits(ids, real).isfinite().all())


def missing_packing(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> dict[str, str]:
    if convention.documents is None:
        return {"packing": has_no(module, "document_ids")}
    documents = (torch.arange(LENGTH) // 2 + 1).expand_as(ids)
    why = refusal(LM(module, config, convention).packed, ids, documents)
    return {} if why is None else {"packing": f"forward({convention.documents}=…) takes no (batch, seq): {why}"}


def mask_kinds(convention: Convention) -> list[Convention]:
    kinds = [(dtype, padding) for dtype, padding in _MASK_KINDS if not padding or convention.mask not in _MARKS_REAL]
    return [replace(convention, mask_dtype=dtype, mask_marks_padding=padding) for dtype, padding in kinds]
