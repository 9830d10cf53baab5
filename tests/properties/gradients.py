"""Gradients reach every parameter, and are right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.properties.compare import assert_same, require

Objective = Callable[[nn.Module], Tensor]  # the scalar loss of a model on some fixed batch


def every_parameter_gets_a_gradient(model: nn.Module, objective: Objective) -> None:
    """Each parameter has a gradient that is finite, and not zero everywhere."""
    _, gradients = _loss_and_gradients(model, objective)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        require(bool(gradient.isfinite().all()), f"{name}: expected a finite gradient, seen {gradient.flatten()}")
        require(bool((gradient != 0).any()), f"{name}: expected a gradient, seen zeros everywhere")


def absent_tokens_get_no_gradient(
    model: nn.Module, objective: Objective, embedding_weight: Tensor, input_ids: Tensor
) -> None:
    """The embedding of a token that is not in the batch has a gradient of exactly zero (weights not tied)."""
    (gradient,) = torch.autograd.grad(objective(model), embedding_weight)
    present = torch.zeros(len(gradient), dtype=torch.bool)
    present[input_ids.flatten()] = True
    touched = (gradient != 0).any(dim=1)
    wrong = (touched & ~present).nonzero().flatten().tolist()
    require(not wrong, f"embedding: expected no gradient for tokens that are not in the batch, seen one for {wrong}")
    require(bool(touched.any()), "embedding: expected a gradient at the tokens of the batch, seen zeros everywhere")


@torch.no_grad()
def small_step_lowers_the_loss(model: nn.Module, objective: Objective, size: float = 1e-6) -> None:
    """A step of length ``size`` against the gradient lowers the loss by ``size`` times the gradient's length."""
    before, gradients = _loss_and_gradients(model, objective)
    length = float(torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.sub_(gradient, alpha=size / length)
    lowered = float(before - objective(model))
    # Half of the first-order decrease leaves room for curvature, which is of order size².
    require(
        lowered > 0.5 * size * length,
        f"a step of {size} down a gradient of length {length:.3g}: expected the loss {float(before):.6g} to fall by "
        f"about {size * length:.3g}, seen {lowered:.3g}",
    )


@torch.no_grad()
def gradient_equals_finite_differences(
    model: nn.Module, objective: Objective, seed: int, step: float = 1e-6, tolerance: float = 1e-7
) -> None:
    """Along a random direction, the gradient is the slope of the loss (fourth-order central difference, float64).

    Rounding adds a few eps / step = 2e-10, and the formula step⁴ = 1e-24 times a fifth derivative, which a norm of a
    small vector makes large (1e14 was seen). The bound is relative to the largest slope that there could be, the
    product of both lengths.
    """
    _, gradients = _loss_and_gradients(model, objective)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    start = [parameter.clone() for parameter in model.parameters()]

    def loss_at(distance: float) -> Tensor:
        for parameter, origin, direction in zip(model.parameters(), start, directions, strict=True):
            parameter.copy_(origin + distance * direction)
        return objective(model)

    near, far = loss_at(step) - loss_at(-step), loss_at(2 * step) - loss_at(-2 * step)
    loss_at(0.0)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    longest = sum((g**2).sum() for g in gradients) ** 0.5 * sum((d**2).sum() for d in directions) ** 0.5
    assert_same(
        torch.as_tensor(slope), (8 * near - far) / (12 * step), "slope of the loss", tolerance, max(1.0, float(longest))
    )


def _loss_and_gradients(model: nn.Module, objective: Objective) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradient for each parameter; zeros for one that has no part in it."""
    with torch.enable_grad():
        loss = objective(model)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
