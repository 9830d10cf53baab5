"""The matrices of the model, laid out in memory for what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from diymodel._attributes import direct

HALF_TYPES = (torch.float16, torch.bfloat16)


def drawn(rows: int, columns: int, std: float) -> Tensor:
    """A matrix (rows, columns) from N(0, std²); empty on the meta device, where torch is slow to draw nothing."""
    matrix = torch.empty(rows, columns)
    return matrix if matrix.is_meta else matrix.normal_(std=std)


@direct(parameters=("weight", "bias"))
class Linear(nn.Linear):
    """``x @ weight.T``, with a weight (out, in) drawn from N(0, std²).

    In eval mode on a CPU, a large weight in float32 lies in memory column by column, its shape being the same: decoding
    multiplies it with one vector, which takes MKL about half the time in that order. The fused optimizer, half types
    (24 ms against 19 for a step of 512 × 8 in bfloat16) and other devices want it row by row.
    """

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.weight = nn.Parameter(drawn(out_features, in_features, std))

    def reset_parameters(self) -> None:
        """Nothing: torch would draw the weight a first time here."""

    def train(self, mode: bool = True) -> Self:
        """As ``nn.Module``'s, and lays the weight and its gradient out for what comes."""
        large = self.weight.device.type == "cpu" and self.weight.numel() >= 2**18
        by_column = large and not mode and self.weight.dtype not in HALF_TYPES
        for tensor in (self.weight, self.weight.grad):
            if tensor is not None and tensor.t().is_contiguous() != by_column:
                with torch.inference_mode(False):  # or the weight could not be trained afterwards
                    tensor.data = tensor.data.t().contiguous().t() if by_column else tensor.data.contiguous()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # to(), bfloat16() …: what lies well in one dtype or on one device does not in another.
        return super()._apply(fn, recurse).train(self.training)  # type: ignore[no-untyped-call, no-any-return]
