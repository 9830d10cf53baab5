"""What modules run in, wherever checks are run from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_attention = F.scaled_dot_product_attention


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """One thread, as modules here are so tiny that more would wait for each other, and masks that torch reads right.

    A mask of ``torch.full(…, -inf)`` is float32 whatever the module is. Beside it, torch 2.13 computes attention of 16
    positions and more wrongly on a CPU if the rest is float64, in which nobody but the checks runs such a module.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", _with_mask_of_its_type):
            yield
    finally:
        torch.set_num_threads(before)


def _with_mask_of_its_type(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **named: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.float32 and query.dtype == torch.float64:
        attn_mask = attn_mask.double()
    return _attention(query, key, value, attn_mask, *more, **named)
