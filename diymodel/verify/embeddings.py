"""The tables of embeddings in a stranger's module: torch's own, and those written by hand."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Table(NamedTuple):
    """A part that gives every token, or position, a row of its weights."""

    part: nn.Module
    weight: nn.Parameter  # (rows, hidden)


def tables_of(module: nn.Module) -> list[Table]:
    """All ``nn.Embedding``, and parts with one matrix of their own whose class is called something with "embed"."""
    found = []
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        by_hand = "embed" in type(part).__name__.lower() and len(own) == 1 and own[0].dim() == 2
        if isinstance(part, nn.Embedding) or by_hand:
            found.append(Table(part, own[0]))
    return found
