"""Repairs of what a layer computes: the scale of its scores, its activation, what its experts are weighed with.

Shapes: T query length, S key length, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify.experiments.repairs import SDPA, SOFTMAX, Repair, attention_inputs, dimension, over_keys

Rule = Callable[[Tensor], Tensor]
_SIGMOID = (torch.sigmoid, Tensor.sigmoid, F.sigmoid)
CHOICES = (torch.topk, Tensor.topk, torch.max, Tensor.max)


class ScaledScores(Repair):
    """The scores of attention times a factor; what hides a key goes on hiding it."""

    def __init__(self, factor: float, start: int, length: int) -> None:
        super().__init__(start, length)
        self.factor = factor

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is SDPA:
            inputs = attention_inputs(args, kwargs)
            scale = inputs.get("scale") or inputs["query"].shape[-1] ** -0.5
            return function(**{**inputs, "scale": scale * self.factor})
        if function in SOFTMAX and over_keys(args[0], dimension(args, kwargs), self.length):
            scores = args[0]
            hidden = scores <= torch.finfo(scores.dtype).min / 2
            return function(torch.where(hidden, scores, scores * self.factor), *args[1:], **kwargs)
        return function(*args, **kwargs)


ACTIVATIONS: Mapping[str, Rule] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "elu": F.elu,
    "mish": F.mish,
}
_CALLED = {
    F.silu: "silu",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    Tensor.relu: "relu",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    F.elu: "elu",
    F.mish: "mish",
}


def activation_called(function: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Which of them an operation is."""
    if function is F.gelu:
        return "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return _CALLED.get(function)


class OtherActivation(Repair):
    """One activation, wherever it is called, becomes another."""

    def __init__(self, old: str, new: str, start: int, length: int) -> None:
        super().__init__(start, length)
        self.old, self.new = old, new

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if activation_called(function, kwargs) == self.old:
            return ACTIVATIONS[self.new](args[0] if args else kwargs["input"])
        return function(*args, **kwargs)


class GateAndUpExchanged(Repair):
    """Of a product of two branches, the other one is activated."""

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length)
        self.activated: list[tuple[Tensor, Tensor, Rule]] = []  # result, what it was made of, and how

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(function, "__name__", "") in ("mul", "__mul__", "__rmul__") and len(args) == 2:
            for one, other in (args, args[::-1]):
                for result, made_of, rule in self.activated:
                    if one is result and isinstance(other, Tensor) and other.shape == one.shape:
                        return function(made_of, rule(other))
        result = function(*args, **kwargs)
        name = activation_called(function, kwargs)
        if name is not None and args:
            self.activated.append((result, args[0], ACTIVATIONS[name]))
        return result


def _as_it_is(scores: Tensor) -> Tensor:
    return scores


def _to_one(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


ROUTINGS: tuple[tuple[Rule, Rule], ...] = (  # of all scores, and then of those that are chosen
    (_softmax, _as_it_is),
    (_softmax, _to_one),
    (torch.sigmoid, _as_it_is),
    (torch.sigmoid, _to_one),
    (_as_it_is, _softmax),
    (_as_it_is, torch.sigmoid),
    (_as_it_is, _as_it_is),
)


class OtherRouting(Repair):
    """The largest of some scores are chosen as before, and weighed by another rule.

    Args:
        of_all: how the scores (…, E) of all experts become weights.
        of_chosen: how the weights of the chosen ones become what they count with.
    """

    def __init__(self, of_all: Rule, of_chosen: Rule, start: int, length: int) -> None:
        super().__init__(start, length)
        self.of_all, self.of_chosen = of_all, of_chosen
        self.raw: list[tuple[Tensor, Tensor]] = []  # probabilities, and the scores they were made of

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = function(*args, **kwargs)
        if (function in SOFTMAX and dimension(args, kwargs) in (-1, args[0].dim() - 1)) or function in _SIGMOID:
            self.raw.append((result, args[0]))
        if function in CHOICES and not isinstance(result, Tensor) and result[0].is_floating_point():
            scores = next((raw for made, raw in self.raw if made is args[0]), args[0])
            if result[1].shape[: scores.dim() - 1] != scores.shape[:-1]:
                return result  # along another dimension
            weights = self.of_all(scores)
            chosen = weights.gather(-1, result[1] if result[1].dim() == weights.dim() else result[1][..., None])
            return type(result)((self.of_chosen(chosen).view_as(result[0]), result[1]))
        return result
