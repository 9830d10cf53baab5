"""Watchers: what the operations of a stranger's forward pass were given, and gave. They change nothing.

Shapes: T query length, S key length (cached + T).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diymodel.verify.experiments.repairs import SDPA, SOFTMAX, attention_inputs, by_hand, dimension, over_keys
from diymodel.verify.experiments.repairs_layers import CHOICES
from diymodel.verify.held import tensors_in

_HALF = (torch.float16, torch.bfloat16)
_SQUARES = {
    "square",
    "square_",
    "pow",
    "__pow__",
    "__ipow__",
    "norm",
    "vector_norm",
    "mean",
    "sum",
    "var",
    "std",
    "dot",
}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "multiply", "addcmul"}  # of a tensor with itself: a square
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_PADS = {"pad", "constant_pad_nd"}
_FILLS = {"__setitem__", "copy_", "index_copy_", "index_put_", "scatter_", "__get__"}  # "__get__": of attributes
_PLACES = {"argmax", "argsort", "sort"}
_CONVOLUTIONS = {"conv1d", "conv2d"}
_PADDING = 4  # which argument of a convolution it is
_EXPONENTIALS = {"exp", "exp_"}
_HEADS, _PROJECTIONS = 4, 5  # arguments of F.multi_head_attention_forward
_SCORES = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}


class Watcher(TorchFunctionMode):
    """Sees every operation."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not Tensor.__deepcopy__:  # which is given the modules that are half copied
            self.note(function, args, kwargs or {}, result)
        return result

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """One operation, and what it gave."""


class ZeroRows(Watcher):
    """Zeros that are made for each row and read, or padded with: on a cache, in place of what the row carried over.

    What is written over before anything is computed of it is room that is made, and no zeros to go on with.

    Args:
        seen: where they are put.
        rows: of the batch.
    """

    def __init__(self, seen: list[Tensor], rows: int, start: int, length: int) -> None:
        super().__init__()
        self.seen = seen
        self.rows = rows
        self.unread: dict[int, Tensor] = {}  # by where they lie

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = getattr(function, "__name__", "")
        if name not in _FILLS:
            in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            self._read(tensors_in((args, kwargs)), result, in_place)
        if not isinstance(result, Tensor) or result.dim() < 2 or len(result) != self.rows:
            return
        if name in _ZEROS:
            self.unread[_place(result)] = result
        elif name in _PADS or (name in _CONVOLUTIONS and _pads(args, kwargs)):
            self.seen.append(result)

    def _read(self, given: list[Tensor], result: Any, in_place: bool) -> None:
        for tensor in given:
            zeros = self.unread.get(_place(tensor))
            is_view = isinstance(result, Tensor) and not in_place and _place(result) == _place(tensor)
            if zeros is not None and not is_view and not bool(tensor.any()):
                self.seen.append(self.unread.pop(_place(tensor)))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class AttentionWeights(Watcher):
    """The weights (…, T, S) that queries give to keys, of each attention in a call of T tokens.

    Room that a cache has behind the last query is left out. They are NaN where a query may see no key; an attention
    whose scores are NaN already is left out.

    Args:
        seen: where they are put, in the order of the calls.
        log: their logarithms, in which a weight that is rounded to 0 is still told from none.
    """

    def __init__(self, seen: list[Tensor], start: int, length: int, log: bool = False) -> None:
        super().__init__()
        self.seen = seen
        self.start = start
        self.length = length
        self.log = log

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = _given_to_attention(function, args, kwargs, self.length)
        if given is None or _has_nan(given):
            return
        if function is F.multi_head_attention_forward:
            asked = {**kwargs, "need_weights": True, "average_attn_weights": False, "training": False}
            weights = function(*args, **asked)[1]
            assert weights is not None, "they were asked for"
            weights = weights.log() if self.log else weights
        elif function is not SDPA and function not in SOFTMAX:  # a division
            weights = result.log() if self.log else result
        else:
            scores = _masked_scores(**attention_inputs(args, kwargs)) if function is SDPA else args[0]
            weights = scores.log_softmax(-1) if self.log else scores.softmax(-1)
        self.seen.append(weights.detach()[..., : self.start + self.length])


class NaNsGiven(Watcher):
    """Whether attention is given NaN.

    Args:
        seen: gets, of each attention in a call of T tokens, whether it is.
    """

    def __init__(self, seen: list[bool], start: int, length: int) -> None:
        super().__init__()
        self.seen = seen
        self.length = length

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = _given_to_attention(function, args, kwargs, self.length)
        if given is not None:
            self.seen.append(_has_nan(given))


def _largest(scores: Tensor) -> float:
    """But for a mask's infinities."""
    return float(scores.detach().masked_fill(~scores.isfinite(), 0.0).max())


def _most(query: Tensor, key: Tensor, scale: float) -> float:
    """What no score is larger than."""
    return float(query.detach().norm(dim=-1).max() * key.detach().norm(dim=-1).max()) * scale


def _pads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a convolution puts zeros around its input."""
    padding = args[_PADDING] if len(args) > _PADDING else kwargs.get("padding", 0)
    return padding not in (0, (0,), (0, 0), "valid")


def _given_to_attention(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], length: int
) -> tuple[Tensor, ...] | None:
    """Queries and keys, or their scores; None where an operation is no attention."""
    if function is SDPA:
        inputs = attention_inputs(args, kwargs)
        return inputs["query"], inputs["key"]
    if function is F.multi_head_attention_forward or (
        function in SOFTMAX and over_keys(args[0], dimension(args, kwargs), length)
    ):
        return args[:1]
    return args[:1] if by_hand(function, args, length) == -1 else None


def _has_nan(tensors: tuple[Tensor, ...]) -> bool:
    return any(bool(tensor.isnan().any()) for tensor in tensors)


def _masked_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's attention takes the softmax of."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -torch.inf)
    return scores + attn_mask


class SoftmaxesOverQueries(Watcher):
    """Whether scores (…, T, S) become weights that add up to 1 over the queries.

    Args:
        seen: gets, of each softmax over queries or keys, whether it is one over queries.
    """

    def __init__(self, seen: list[bool], start: int, length: int) -> None:
        super().__init__()
        self.seen = seen
        self.length = length

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if function in SOFTMAX and over_keys(args[0], -1, self.length):
            self.seen.append(dimension(args, kwargs) in (-2, args[0].dim() - 2))
        elif function in (SDPA, F.multi_head_attention_forward):
            self.seen.append(False)
        elif (axis := by_hand(function, args, self.length)) is not None:
            self.seen.append(axis == -2)


class Scores(NamedTuple):
    """How large the numbers are that become the weights of keys."""

    largest: float
    exponential: float = 0.0  # what comes out where forward itself takes the power of e


class LargestScores(Watcher):
    """How large the scores of attention become.

    Args:
        seen: gets those of each softmax over keys, those that queries and keys allow in torch's attention, and what
            comes out of forward's own powers of e for each pair of tokens, with the largest product of such before.
    """

    def __init__(self, seen: list[Scores], start: int, length: int) -> None:
        super().__init__()
        self.seen = seen
        self.length = length
        self.product = 0.0

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if function in SOFTMAX and over_keys(args[0], dimension(args, kwargs), self.length):
            self.seen.append(Scores(_largest(args[0])))
        elif function is SDPA:
            inputs = attention_inputs(args, kwargs)
            query, key = inputs["query"], inputs["key"]
            self.seen.append(Scores(_most(query, key, inputs.get("scale") or query.shape[-1] ** -0.5)))
        elif function is F.multi_head_attention_forward and args[_PROJECTIONS] is not None:
            query, key, _ = (args[0] @ args[_PROJECTIONS].t()).chunk(3, -1)
            self.seen.append(Scores(_most(query, key, (args[_HEADS] / query.shape[-1]) ** 0.5)))
        elif isinstance(result, Tensor) and result.shape[-2:] == (self.length, self.length):
            name = getattr(function, "__name__", "")
            if name in _SCORES:
                self.product = max(self.product, _largest(result))
            elif name in _EXPONENTIALS:
                self.seen.append(Scores(self.product, float(result.detach().max())))


class ExponentialsOfPairs(Watcher):
    """Whether there is a power of e for each pair of tokens, as in a softmax by hand; one a token is a decay.

    Args:
        seen: gets, of each exponential in a call of T tokens, whether it is one of pairs.
    """

    def __init__(self, seen: list[bool], start: int, length: int) -> None:
        super().__init__()
        self.seen = seen
        self.length = length

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if getattr(function, "__name__", "") in _EXPONENTIALS:
            sizes = list(result.shape)
            filled_up = self.length not in sizes and any(n > self.length and sizes.count(n) > 1 for n in sizes)
            self.seen.append(sizes.count(self.length) > 1 or filled_up)


class Choices(Watcher):
    """Whether the largest of some numbers are picked, as a router picks experts.

    Args:
        seen: gets a True for each time.
    """

    def __init__(self, seen: list[bool], start: int, length: int) -> None:
        super().__init__()
        self.seen = seen

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        by_value = function in CHOICES and not isinstance(result, Tensor) and result[0].is_floating_point()
        by_place = getattr(function, "__name__", "") in _PLACES and args[0].is_floating_point()
        if by_value or by_place:
            self.seen.append(True)


class Overflows(Watcher):
    """What first leaves the range of a half type: ``square``, of a power or norm, or ``scores``, before a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self.first is not None:
            return
        given = [tensor for tensor in tensors_in((args, kwargs)) if tensor.dtype in _HALF]
        if not given:
            return
        name = getattr(function, "__name__", "")
        if function is SDPA:
            if bool(_masked_scores(**attention_inputs(args, kwargs)).softmax(-1).isnan().any()):
                self.first = "scores"
        elif function in SOFTMAX:
            if bool(result.isnan().any()):
                self.first = "scores"
        elif isinstance(result, Tensor) and not bool(result.isfinite().all()):
            if not all(bool(tensor.isfinite().all()) for tensor in given):
                return
            if name in _SQUARES or (name in _PRODUCTS and args[-1] is args[-2]):
                self.first = "square"
            elif name in _SCORES:
                self.first = "scores"
