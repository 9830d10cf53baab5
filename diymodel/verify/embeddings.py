"""The tables of embeddings in a stranger's module: torch's own, and those written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOOKUPS = {"embedding", "__getitem__", "index_select"}
_PRODUCTS = {"matmul", "__matmul__", "mm", "einsum"}


class Table(NamedTuple):
    """A matrix that gives every token, or position, a row."""

    weight: nn.Parameter  # (rows, hidden)
    part: nn.Module | None = None  # which gives the rows; None: a part looks them up beside what else it does

    @contextmanager
    def giving(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, calls go on with what ``change`` makes of the rows that the table gives."""
        if self.part is None:
            with _Lookups(lambda table, rows: change(rows) if table is self.weight else rows):
                yield
            return
        hook = self.part.register_forward_hook(lambda part, inputs, rows: change(rows))
        try:
            yield
        finally:
            hook.remove()


def tables_of(module: nn.Module) -> list[Table]:
    """All ``nn.Embedding``, and parts with one matrix of their own whose class is called something with "embed"."""
    found = []
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        by_hand = "embed" in type(part).__name__.lower() and len(own) == 1 and own[0].dim() == 2
        if isinstance(part, nn.Embedding) or by_hand:
            found.append(Table(own[0], part))
    return found


def looked_up(module: nn.Module, call: Callable[[], object]) -> list[Table]:
    """The matrices among a module's parameters in which a call of it looks up rows, by their numbers or one-hot."""
    seen: set[int] = set()

    def note(table: Tensor, rows: Tensor) -> Tensor:
        seen.add(id(table))
        return rows

    with _Lookups(note):
        call()
    return [Table(parameter) for parameter in module.parameters() if id(parameter) in seen and parameter.dim() == 2]


class _Lookups(TorchFunctionMode):
    """Hands over tables, and the rows that are looked up in them, and goes on with the answer."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        table = _table(getattr(function, "__name__", ""), given, result)
        return result if table is None else self.answer(table, result)


def _table(function: str, given: Sequence[Tensor], result: Any) -> Tensor | None:
    """The one that a function of tensors takes rows from: by integers, or as a product with rows of one 1 each."""
    if function in _LOOKUPS and any(x.dtype in (torch.int64, torch.int32) for x in given):
        return next((x for x in given if x.is_floating_point()), None)
    if function in _PRODUCTS and len(given) == 2 and given[1].dim() == 2:
        chosen, table = given
        if chosen.shape[-1] == len(table) and result.shape == (*chosen.shape[:-1], table.shape[1]):
            return table if _is_one_hot(chosen) else None
    return None


def _is_one_hot(rows: Tensor) -> bool:
    try:
        return bool(((rows == 0) | (rows == 1)).all()) and bool((rows.sum(-1) == 1).all())
    except RuntimeError:  # within torch.func.vmap nothing has a value
        return False
