"""The floor of a decode step: at batch 1 every weight is read once, and nothing can be faster than that reading.

Two floors: the time of the matrix-vector products alone, measured in place with the model's own weights, and the bytes
of weights and cache over the memory bandwidth that a plain read reaches on this device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from diymodel.bench.timing import timed

_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than any cache of the device holds


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading a large tensor, the best of several."""
    large = torch.ones(_BYTES.get(device.type, 2**28) // 4, device=device)
    large.sum()
    return large.nbytes / min(timed(large.sum, device) for _ in range(5))


def read_bytes(module: nn.Module, cache_bytes: int) -> int:
    """Bytes that a decode step must read: every weight but the embedding's other rows, and the cache."""
    tied = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear)}
    tables = [
        part.weight for part in module.modules() if isinstance(part, nn.Embedding) and id(part.weight) not in tied
    ]
    weights = sum(weight.nbytes for weight in module.parameters())
    return weights - sum(table.nbytes - table[0].nbytes for table in tables) + cache_bytes


def matrix_vector_products(module: nn.Module, rows: int = 1) -> Callable[[], None]:
    """All linear layers of a module, each on one vector a row, in the order of the module."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    vectors = {layer.in_features: layer.weight.new_ones(rows, 1, layer.in_features) for layer in layers}

    def run() -> None:
        for layer in layers:
            layer(vectors[layer.in_features])

    return run


def share_of_bound(bytes_read: int, bandwidth: float, seconds: float) -> float:
    """How much of the bandwidth bound a step reaches: 1 is as fast as its bytes can be read."""
    return bytes_read / bandwidth / seconds
