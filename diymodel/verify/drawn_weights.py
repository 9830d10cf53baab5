"""The weights that a trial draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int, sharpness: int) -> None:
    """Weights sharp enough that a bug shows: matrices from N(0, (sharpness/√d)²), vectors a little off their start.

    The usual 0.02 makes every distribution near-uniform; N(0, 1) saturates attention, which hides masks. A vector that
    is frozen is a constant, such as rotary frequencies, and others may have been computed from it; one that its
    constructor leaves undefined is none.
    """
    generator = torch.Generator()
    for index, parameter in enumerate(module.parameters()):
        generator.manual_seed(1000 * seed + index)
        kind = torch.complex64 if parameter.is_complex() else torch.float32
        own = _without_repeats(parameter)
        noise = torch.randn(own.shape, generator=generator, dtype=kind).to(own)
        if parameter.dim() >= 2:
            own.copy_(noise * sharpness / own.shape[-1] ** 0.5)
        elif parameter.requires_grad or bool(own.isnan().any()):
            own.copy_(own.where(~own.isnan(), 0) + noise / 4)


def _without_repeats(parameter: Tensor) -> Tensor:
    """The numbers of a parameter once each: one that was made by ``expand`` shows some many times."""
    for dim, (size, stride) in enumerate(zip(parameter.shape, parameter.stride(), strict=True)):
        if stride == 0 and size > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter
