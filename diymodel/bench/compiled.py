"""Steps of static shape made faster: ``torch.compile``, and on CUDA a graph that is captured once and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.caches import MaskedDecoder
from diymodel.compiled import captured
from diymodel.model import DIYForCausalLM

StaticStep = Callable[[Tensor, Tensor], Tensor]  # ids (B, 1), position (1,) -> logits (B, 1, V)

ENGINES = {
    "masked_compiled": "masked buffer, torch.compile",
    "masked_graph": "masked buffer, CUDA graph",
    "masked_compiled_graph": "masked buffer, torch.compile and CUDA graph",
}


def missing(engine: str, device: torch.device) -> str | None:
    """Why an engine cannot run here; None where it can."""
    if "graph" in engine and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    return None


def engine_decoder(engine: str, module: DIYForCausalLM, capacity: int, rows: int = 1) -> MaskedDecoder:
    """Our model on a masked buffer, its step run by an engine of :data:`ENGINES`."""

    def wrap(step: StaticStep) -> StaticStep:
        if "compiled" in engine:
            step = quiet(torch.compile(step, fullgraph=True, dynamic=False))
        return _captured(step) if "graph" in engine else step

    return MaskedDecoder(module, capacity, rows, wrap)


def quiet(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose first call, which compiles, keeps the compiler's warnings to itself.

    They tell how it might have done better, such as by float32 products in TensorFloat32, which are other products.
    """
    first = True

    def run(*arguments: Any, **named: Any) -> Any:
        nonlocal first
        if not first:
            return compiled(*arguments, **named)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = compiled(*arguments, **named)
        first = False
        return result

    return run


def _captured(step: StaticStep) -> StaticStep:
    """The step as a CUDA graph, from its first call on."""
    run: StaticStep | None = None

    def replay(ids: Tensor, position: Tensor) -> Tensor:
        nonlocal run
        if run is None:
            run = captured(step, ids, position)
        return run(ids, position)

    return replay
