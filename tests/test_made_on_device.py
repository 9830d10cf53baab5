"""What a call makes on the CPU beside tensors on a GPU is found without one; what a GPU takes is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from tests.test_adapters import Tiny

DEVICE = "cpu"  # as a learner's file has it: the best that there is on this machine


class Adds(Tiny):
    """Adds something to the embeddings, which depends on the position."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.added(x, input_ids.shape[1]))

    def added(self, x: Tensor, length: int) -> Any:
        raise NotImplementedError


class Says(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length, device=x.device)[:, None].to(x)


class SaysGlobally(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length, device=DEVICE)[:, None]


class Moves(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length)[:, None].to(x.device)


class MovesWithAnother(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length).view(-1, 1).type_as(x)


class TakesTheDefault(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        with torch.device(x.device):
            return torch.arange(length)[:, None]


class AddsANumber(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.tensor(0.5) * torch.tensor(length)


class ReadsNumbers(Adds):
    """What it makes on the CPU it reads there."""

    def added(self, x: Tensor, length: int) -> Tensor:
        return x.new_tensor([float(torch.arange(i + 1).sum()) for i in range(length)])[:, None]


class Indexes(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return x.new_ones(length, 1)[torch.arange(length)]


class MakesATable(Adds):
    """The device of what is on the CPU is the CPU; the whole table is moved at last."""

    def added(self, x: Tensor, length: int) -> Tensor:
        steps = torch.arange(length)
        table = torch.outer(steps, torch.ones(1, device=steps.device))
        return table.to(DEVICE)


class Copies(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return x.new_empty(length, 1).copy_(torch.arange(length)[:, None])


class Forgets(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length)[:, None]


class ForgetsInASum(Adds):
    """What is computed from tensors on the CPU alone is there too."""

    def added(self, x: Tensor, length: int) -> Tensor:
        return (torch.ones(length, length).tril().sum(1) * 0.5)[:, None]


class GoesBack(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        return torch.arange(length, device=x.device).cpu()[:, None]


class MakesATableAndLeavesIt(Adds):
    def added(self, x: Tensor, length: int) -> Tensor:
        steps = torch.arange(length)
        return torch.ones(length, 1, device=steps.device)


class LooksUp(Adds):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_seq_len, config.hidden_size)

    def added(self, x: Tensor, length: int) -> Any:
        return self.positions(torch.arange(length))


class Asks(Adds):
    """Where it is told that there are two devices, it goes another way."""

    def added(self, x: Tensor, length: int) -> Tensor:
        positions = torch.arange(length)
        if positions.device != x.device:
            positions = torch.arange(length, device=x.device)
        return positions[:, None]


RIGHT = (Says, SaysGlobally, Moves, MovesWithAnother, TakesTheDefault, MakesATable)  # a device, or the input's
RIGHT += (AddsANumber, ReadsNumbers, Indexes, Copies, Asks)


@pytest.mark.parametrize("module", RIGHT)
def test_what_a_gpu_takes_passes(module: type[nn.Module]) -> None:
    report = check_causal_lm(module, profile="quick", only=["state.makes_on_device"])
    assert report.verdict == "passed", report.results[0].failure


@pytest.mark.parametrize(
    ("module", "operation", "origin"),
    [
        (Forgets, "add", "made by `return torch.arange(length)[:, None]`"),
        (ForgetsInASum, "add", "made by `return (torch.ones(length, length).tril().sum(1) * 0.5)[:, None]`"),
        (MakesATableAndLeavesIt, "add", "made by `steps = torch.arange(length)`"),
        (GoesBack, "add", "moved there by `return torch.arange(length, device=x.device).cpu()[:, None]`"),
        (LooksUp, "embedding", "made by `return self.positions(torch.arange(length))`"),
    ],
)
def test_what_a_gpu_refuses_is_named_with_its_line(module: type[nn.Module], operation: str, origin: str) -> None:
    (failed,) = check_causal_lm(module, profile="quick", only=["state.makes_on_device"]).failed
    assert failed.failure is not None
    assert f"saw {operation} given one {origin} (" in failed.failure.message
