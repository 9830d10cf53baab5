"""Tensors that a module leaves behind are found without another device; those that it takes along are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.left_behind import left_behind
from diymodel.verify.subject import Subject
from tests.test_adapters import Tiny

CONFIG = DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, max_seq_len=16)


class Keeps(Tiny):
    """Adds a table to the embeddings, which it keeps as a plain attribute."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.table: Any = torch.arange(16.0)[:, None]

    def added(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.added(self.embed(input_ids)))


class Nested(Keeps):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.table = {"rows": [self.table, None]}

    def added(self, x: Tensor) -> Tensor:
        return x + self.table["rows"][0][: x.shape[1]]


class ByChoice(Keeps):
    """Which tokens count is no shape: the whole of it cannot be tried on the meta device."""

    def added(self, x: Tensor) -> Tensor:
        chosen = (x.sum(-1) > 0).nonzero()
        return super().added(x) + len(chosen) * 0


class Indexes(Keeps):
    """Looks its positions up in a table of parameters."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.table = torch.arange(16)
        self.positions = nn.Embedding(16, config.hidden_size)

    def added(self, x: Tensor) -> Tensor:
        return x + self.positions(self.table[: x.shape[1]])


class Chooses(Keeps):
    """Picks rows of a parameter by a plain index: a GPU takes one from the CPU."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.table = torch.arange(16)
        self.rows = nn.Parameter(torch.zeros(16, config.hidden_size))

    def added(self, x: Tensor) -> Tensor:
        return x + self.rows[self.table[: x.shape[1]]]


class Takes(Keeps):
    def added(self, x: Tensor) -> Tensor:
        self.table = self.table.to(x.device)
        return super().added(x)


class MakesAnew(Keeps):
    def added(self, x: Tensor) -> Tensor:
        if self.table.device != x.device:
            self.table = torch.arange(16.0, device=x.device)[:, None]
        return super().added(x)


class ComputesBeside(Keeps):
    """All that it computes from the table is computed where that is, and taken along at last."""

    def added(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1], device=self.table.device)[:, None]
        return x + (self.table[: x.shape[1]] * rows).to(x.device)


class ComputesBesideAndStays(Keeps):
    def added(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1], device=self.table.device)[:, None]


class Counts(Keeps):
    def added(self, x: Tensor) -> Tensor:
        return x * self.table[1, 0].item()


class Registers(Keeps):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        del self.table
        self.register_buffer("table", torch.arange(16.0)[:, None], persistent=False)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        *((module, ["table"]) for module in (Keeps, Nested, ByChoice, Indexes, ComputesBesideAndStays)),
        *((module, []) for module in (Chooses, Takes, MakesAnew, ComputesBeside, Counts, Registers)),
    ],
)
def test_what_is_left_behind(module: type[nn.Module], found: list[str]) -> None:
    lm = LM(module(CONFIG), CONFIG, Subject(module).convention)
    assert left_behind(lm, torch.tensor([[1, 2, 3]])) == found
