"""The place where numbers first overflow is the operation and the innermost part that has a name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify.experiments.first_overflow import first_overflow

LARGE = torch.full((3,), 300.0, dtype=torch.float16)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tensor([False, True, True])
        return x.masked_fill(hidden, -torch.inf).softmax(-1)


class AllMasked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.ones(3, dtype=torch.bool), -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("parts", "place"),
    [
        ([nn.Identity(), Norm()], "pow in 1"),
        ([nn.Sequential(nn.Identity(), AllMasked()), Norm()], "softmax in 0.1"),
        ([Masked()], None),
        ([nn.Identity()], None),
    ],
)
def test_the_first_overflow_is_found_and_a_mask_is_none(parts: list[nn.Module], place: str | None) -> None:
    module = nn.Sequential(*parts)
    given: list[Tensor] = []
    assert first_overflow(module, lambda: given.append(module(LARGE))) == place
    torch.testing.assert_close(given, [module(LARGE)], equal_nan=True)  # watching changes nothing
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_what_fails_on_the_way_is_told_without_a_place() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert first_overflow(module, partial(module, LARGE)) is None
    assert not module[0]._forward_hooks
