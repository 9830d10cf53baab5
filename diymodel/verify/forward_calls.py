"""Every call of a module's forward, however it is made.

A hook would miss ``self.forward(…)``, which many a ``generate`` calls: that runs no hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_calls(module: nn.Module, after: Callable[[Any], object]) -> Iterator[None]:
    """Inside, ``after`` gets what each call returns, and may change it in place."""
    forward = module.forward

    def followed(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        after(output)
        return output

    kept = dict(vars(module))
    module.forward = followed
    try:
        yield
    finally:
        if "forward" in kept:
            module.forward = kept["forward"]
        else:
            del module.forward
