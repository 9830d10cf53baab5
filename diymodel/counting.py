"""FLOPs of a computation by counting, products with weights apart from products of activations (attention).

A multiplication and the addition after it are 2 FLOPs. Only matrix products, convolutions and attention are counted, as
by ``torch.utils.flop_counter``, from whose registry the formulas come. Attention runs under the math backend: torch
knows no formula for the CPU's flash kernel. On the meta device nothing is computed and the count is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diymodel._compat import DispatchMode, SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Flops:
    """FLOPs of the two kinds."""

    linear: int  # products with weights
    attention: int  # products of activations: queries by keys, weights of attention by values

    @property
    def total(self) -> int:
        return self.linear + self.attention


def count_flops(run: Callable[[], object], module: nn.Module) -> Flops:
    """FLOPs of one call of ``run``, which calls the module.

    What has one of the module's weights, or what was made of its weights alone (a cast, a transposed or an unpacked
    copy), as a factor is linear.
    """
    counter = _Counter(module)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return Flops(counter.linear, counter.attention)


class _Counter(DispatchMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        packed = [b for b in module.buffers() if b.dtype in (torch.int8, torch.uint8) and b.dim() >= 2]
        self._weights = {_storage(tensor) for tensor in (*module.parameters(), *packed)}
        self._made: list[Tensor] = []  # kept, so that no other storage gets the address of one
        self.linear = 0
        self.attention = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry and func is not torch.ops.prim.device.default:
            with self:  # a composite of others, of which nobody has seen the parts yet
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weights = [tensor for tensor in tensors if _storage(tensor) in self._weights]
        if func._overloadpacket in flop_registry:
            flops = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
            if weights:
                self.linear += flops
            else:
                self.attention += flops
        elif tensors and len(weights) == len(tensors):
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self._weights.add(_storage(made))
                    self._made.append(made)
        return out


def _storage(tensor: Tensor) -> int:
    try:
        address: int = tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return id(tensor)
    return address
