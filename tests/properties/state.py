"""The state dict is the whole model; tied weights are one weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.properties.compare import assert_differs, assert_identical, assert_refused, require

Operation = Callable[[nn.Module], nn.Module]  # what may happen to a model: gives the model to go on with


def round_trip_is_exact(model: nn.Module, fresh: nn.Module, input_ids: Tensor) -> None:
    """A model with other weights that loads the state dict computes the same, bit for bit."""
    expected = model(input_ids)
    assert_differs(fresh(input_ids), expected, "logits before loading")
    fresh.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert_identical(fresh(input_ids), expected, "logits after loading")


def load_is_strict(model: nn.Module, name: str) -> None:
    """A missing, an unexpected and a mis-shaped entry are each refused with their name."""
    state = model.state_dict()
    missing = {key: tensor for key, tensor in state.items() if key != name}
    wrong_shape = {**state, name: torch.cat((state[name], state[name][:1]))}
    assert_refused(lambda: model.load_state_dict(missing), name, f"a state dict without {name}")
    assert_refused(lambda: model.load_state_dict({**state, "extra.weight": torch.zeros(1)}), "extra.weight", "an extra")
    assert_refused(lambda: model.load_state_dict(wrong_shape), name, f"a state dict with another shape of {name}")


def tie_survives(model: nn.Module, names: tuple[str, str], operation: Operation) -> None:
    """After the operation, both names are still one parameter, counted once."""
    count = sum(parameter.numel() for parameter in model.parameters())
    after = operation(model)
    first, second = (after.get_parameter(name) for name in names)
    require(first is second, f"{names[0]} and {names[1]}: expected one parameter, seen two")
    seen = sum(parameter.numel() for parameter in after.parameters())
    require(seen == count, f"number of parameters: expected {count} as before, seen {seen}")


def untied_head_is_refused(model: nn.Module, names: tuple[str, str]) -> None:
    """A model that ties two weights does not load a state dict in which they differ."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[names[1]] += 1
    assert_refused(lambda: model.load_state_dict(state), names[1], f"{names[1]} unlike {names[0]}")


def number_of_parameters_is(model: nn.Module, expected: int) -> None:
    """Every weight of the architecture is registered, and registered once."""
    seen = sum(parameter.numel() for parameter in model.parameters())
    require(seen == expected, f"number of parameters: expected {expected}, seen {seen}")


def depth_adds_parameters(build: Callable[[int], nn.Module], depth: int) -> None:
    """Each further layer adds the same number of parameters, above 0: no block is used twice."""
    counts = [sum(p.numel() for p in build(layers).parameters()) for layers in range(depth, depth + 3)]
    steps = counts[1] - counts[0], counts[2] - counts[1]
    require(
        steps[0] == steps[1] > 0,
        f"parameters added by layers {depth + 1} and {depth + 2}: expected the same, above 0, seen {steps}",
    )


def deepcopy_is_independent(model: nn.Module, input_ids: Tensor) -> None:
    """A deep copy computes the same, and changing it leaves the original alone."""
    expected = model(input_ids)
    copied = copy.deepcopy(model)
    assert_identical(copied(input_ids), expected, "logits of a deep copy")
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(torch.linspace(0.1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter))
    assert_identical(model(input_ids), expected, "logits of the original after its deep copy was changed")
    assert_differs(copied(input_ids), expected, "logits of the changed deep copy")
