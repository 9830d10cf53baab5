"""The probabilities of dropout that a stranger's module holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

NEXT_TO_NONE = 1e-15  # a dropout that never drops, and scales by less than rounding


def dropout_of(module: nn.Module, above: float = 0.0, chosen: float | None = None) -> str | None:
    """The first part of a module that holds a dropout probability above this one; None: none does.

    One that drops all is no probability that anybody chose, but another taken for its opposite.

    Args:
        chosen: is such a probability, by whatever name it is held.
    """
    for name, part in module.named_modules():
        for key, value in _probabilities(part, chosen).items():
            if above < value < 1 - above:
                return f"{name}.{key}={value}".lstrip(".")
    return None


@contextmanager
def next_to_no_dropout(module: nn.Module) -> Iterator[None]:
    """Inside, dropout takes its usual way and drops nothing, wherever parts hold its probability."""
    held = [(part, _probabilities(part)) for part in module.modules()]
    for part, probabilities in held:
        vars(part).update({key: NEXT_TO_NONE for key, value in probabilities.items() if 0 < value < 1})
    try:
        yield
    finally:
        for part, probabilities in held:
            vars(part).update(probabilities)


def _probabilities(part: nn.Module, chosen: float | None = None) -> dict[str, float]:
    """What a part holds that may be a probability of dropout, by the name of the attribute."""
    is_dropout = isinstance(part, nn.modules.dropout._DropoutNd)
    numbers = {key: value for key, value in vars(part).items() if type(value) in (int, float)}
    return {
        key: value
        for key, value in numbers.items()
        if "drop" in key.lower() or (is_dropout and key == "p") or value == chosen
    }
