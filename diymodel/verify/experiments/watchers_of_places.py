"""Watchers of what the place of a token decides: tables that turn activations, biases that weigh distances.

Shapes: T query length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.experiments.repairs import SDPA, attention_inputs
from diymodel.verify.experiments.watchers import Watcher
from diymodel.verify.held import tensors_in

_MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply", "addcmul", "div", "__truediv__"}
_PRODUCTS |= _MATRIX_PRODUCTS
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "__isub__", "sub_", "baddbmm"}
NOISE = {"randn", "randn_like", "normal", "normal_", "uniform_", "exponential_", "gumbel_softmax"}
_VIEWS = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"}
_VALUES = 3  # a mask has two
_HIDDEN = -1e4  # and hides by one that is so small


class Calls(Watcher):
    """The names of all operations, and whether attention was told to drop."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.drops = False

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.names.add(getattr(function, "__name__", ""))
        if function is SDPA:
            self.drops |= bool(attention_inputs(args, kwargs).get("dropout_p"))


class WeighedPlaces(Watcher):
    """What is multiplied with a matrix of a number for each pair of places, as attention weighs keys by any function.

    Args:
        found: where those matrices (…, T, T) are put.
        length: T.
    """

    def __init__(self, found: list[Tensor], start: int, length: int) -> None:
        super().__init__()
        self.found = found
        self.pairs = (length, length)

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if getattr(function, "__name__", "") in _MATRIX_PRODUCTS:
            self.found += [operand for operand in tensors_in(args) if operand.shape[-2:] == self.pairs]


@dataclass(frozen=True)
class Operand:
    """Numbers that differ from place to place, in a sum or a product."""

    numbers: Tensor
    result: Tensor
    multiplies: bool
    on_scores: bool  # the result has a number for each pair of places

    def same(self, other: Operand) -> bool:
        """Whether the numbers are those of another call, and the result is not: they do not depend on tokens."""
        if self.numbers.shape != other.numbers.shape or self.result.shape != other.result.shape:
            return False
        return self.numbers.equal(other.numbers) and not self.result.equal(other.result)


class PlaceOperands(Watcher):
    """What may go into sums and products by its place.

    Args:
        seen: where they are put.
        names: gets the names of all operations.
    """

    def __init__(self, seen: list[Operand], names: set[str], start: int, length: int) -> None:
        super().__init__()
        self.seen, self.names, self.length = seen, names, length

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        self.names.add(name)
        if function is SDPA:
            operands, result = [attention_inputs(args, kwargs).get("attn_mask")], result
            sums, scores = True, True
        elif name in _PRODUCTS or name in _SUMS:
            operands = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            sums = name in _SUMS
            scores = isinstance(result, Tensor) and result.shape[-2:] == (self.length, self.length)
        else:
            return
        for operand in operands:
            if isinstance(operand, Tensor) and self._by_place(operand):
                numbers, whole = operand.detach().clone(), result.detach().clone()
                self.seen.append(Operand(numbers, whole, multiplies=not sums, on_scores=scores))

    def _by_place(self, numbers: Tensor) -> bool:
        """Whether there are more of them than a mask has, along a dimension of T."""
        if not (numbers.is_floating_point() or numbers.is_complex()):
            return False
        axes = [axis for axis, size in enumerate(numbers.shape) if size == self.length]
        along = [numbers.movedim(axis, 0).flatten(1) for axis in axes]
        if not any(bool((x[1:] != x[:-1]).any()) for x in along):
            return False
        if numbers.is_complex():
            return True
        return len(set(numbers[numbers > _HIDDEN].tolist())) >= _VALUES


class MixedPlaces(Watcher):
    """Whether a view puts numbers of several places into the vector of one, as where heads are merged untransposed.

    Args:
        seen: gets, of each view from a dimension of T to another, whether it does.
    """

    def __init__(self, seen: list[bool], start: int, length: int) -> None:
        super().__init__()
        self.seen, self.length = seen, length

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if getattr(function, "__name__", "") not in _VIEWS or self.length not in result.shape:
            return
        sizes = list(args[0].shape)
        if sum(min(size % self.length, -size % self.length) <= 1 < size for size in sizes) != 1:
            return  # scores of pairs, which Transformer-XL shifts by views, or no place at all
        along = [self.length if size == self.length else 1 for size in sizes]
        places = torch.arange(self.length, device=result.device).view(along).expand(sizes).contiguous()
        moved = function(places, *args[1:], **kwargs)
        axes = [axis for axis, size in enumerate(moved.shape) if size == self.length]
        vectors = [moved.movedim(axis, 0).reshape(self.length, -1) for axis in axes]
        self.seen.append(not any(bool((x == x[:, :1]).all()) for x in vectors))
