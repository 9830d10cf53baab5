"""What modules run in, wherever checks are run from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 3  # its place among the arguments of attention: query, key, value, attn_mask


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """One thread, as modules here are so tiny that more would wait for each other, and masks that torch reads right.

    A mask of ``torch.full(…, -inf)`` is float32 whatever the module is. Beside it, torch 2.13 computes attention of 16
    positions and more wrongly on a CPU if the rest is float64, in which nobody but the checks runs such a module.
    """
    threads = torch.get_num_threads()
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention  # which others may have put there

    def with_mask_of_its_type(*given: Any, **named: Any) -> Tensor:
        query = given[0] if given else named["query"]
        mask = given[_MASK] if len(given) > _MASK else named.get("attn_mask")
        if mask is None or (mask.dtype, query.dtype) != (torch.float32, torch.float64):
            return attention(*given, **named)
        if len(given) > _MASK:
            return attention(*given[:_MASK], mask.double(), *given[_MASK + 1 :], **named)
        return attention(*given, **{**named, "attn_mask": mask.double()})

    torch.set_num_threads(1)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", with_mask_of_its_type):
            yield
    finally:
        torch.set_num_threads(threads)
