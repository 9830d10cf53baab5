"""Steps of static shape made faster: ``torch.compile``, and on CUDA a graph that is captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.caches import MaskedDecoder
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
            step = torch.compile(step, fullgraph=True, dynamic=False)
        return _captured(step) if "graph" in engine else step

    return MaskedDecoder(module, capacity, rows, wrap)


def _captured(step: StaticStep) -> StaticStep:
    """The step as a CUDA graph: one launch in place of hundreds. The logits are valid until the next call."""
    graph: torch.cuda.CUDAGraph | None = None
    ids = position = logits = torch.empty(0)

    def replay(new_ids: Tensor, new_position: Tensor) -> Tensor:
        nonlocal graph, ids, position, logits
        if graph is None:
            ids, position = new_ids.clone(), new_position.clone()
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # lazy initialisation and compilation are no part of the graph
                for _ in range(3):
                    step(ids, position)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = step(ids, position)
        ids.copy_(new_ids)
        position.copy_(new_position)
        graph.replay()
        return logits

    return replay
