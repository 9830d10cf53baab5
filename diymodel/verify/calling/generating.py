"""How a stranger's ``generate`` is called, and the call itself; ``generate_probing.py`` finds it by trying.

Shapes: B batch, T prompt length, N new tokens, L length of what is returned, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diymodel.verify.calling.entries import Entry
from diymodel.verify.failure import SubjectError

CAPABILITIES = (
    "generate",
    "generate_batch",
    "generate_padded",
    "generate_cache",
    "greedy",
    "sampling",
    "temperature_zero",
    "top_k",
    "top_p",
    "repetition_penalty",
    "eos",
)
Form = Literal["rows", "row", "list", "lists"]  # tensors (B, T) or (T,), ids in a list, or in a list a row
FORMS: tuple[Form, ...] = get_args(Form)
MANY = 256  # rows, for judging what is drawn
FEWER = (32, 8)  # at once, where a cache on the module has room for no more: Meta's Llama makes it for 32


@dataclass(frozen=True)
class _Ends:
    """What rows that come back as lists of their own lengths are filled up with."""

    starts: list[int]  # of the new tokens in each row
    eos: int  # which a row may end by and leave out
    pad: int

    def equally_long(self, rows: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, rows), default=0)
        filled = []
        for row, start in zip(rows, self.starts, strict=True):
            lacking = longest - len(row)
            end = [] if self.eos in row[start:] else [self.eos]
            filled.append(row + [*end, *[self.pad] * lacking][:lacking])
        return filled


@dataclass(frozen=True)
class Generating:
    """How a module generates. Settings go by role, such as ``eos``, whatever it calls them."""

    names: Mapping[str, str] = field(default_factory=dict)  # role -> parameter
    fixed: Mapping[str, Any] = field(default_factory=dict)  # parameter -> value, where its default would not do
    greedy: Mapping[str, Any] = field(default_factory=dict)  # settings that take the likeliest token
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings that draw one
    counts_prompt: bool = False  # the number of tokens asked for includes the prompt
    returns_prompt: bool = True
    one_row: bool = False
    most_rows: int = MANY  # of one call that draws
    form: Form = "rows"  # of the prompts
    ragged: bool = False  # short prompts come in a list a row, without padding
    pads_left: bool = False  # short prompts are padded on the left
    follows_padding: bool = True  # new tokens of a row padded on the right stand after its padding, not before it
    mask_dtype: torch.dtype = torch.int64
    mask_marks_padding: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)  # capability -> why generate does not have it
    entry: Entry = field(default_factory=Entry)  # what is called

    def run(
        self, module: nn.Module, ids: Tensor, new_tokens: int, real: Tensor | None, settings: Mapping[str, Any]
    ) -> Tensor:
        """Prompts and what follows them, (B, L); ``real`` (B, T) is False at padding.

        A ``seed`` that generate does not take is set for all of torch.
        """
        names, count = self.names, new_tokens + (ids.shape[1] if self.counts_prompt else 0)
        if "seed" in settings and "seed" not in names:
            torch.manual_seed(settings["seed"])
        if real is None and "pad" in settings:  # transformers takes pads in the prompt for padding unless it is told
            real = torch.ones_like(ids, dtype=torch.bool)
        prompts = self._formed(ids) if real is None or not self.ragged else _without_padding(ids, real)
        arguments = {**self.fixed, names["ids"]: prompts, names["new_tokens"]: count}
        arguments |= {names[role]: value for role, value in settings.items() if role in names}
        if real is not None and "lengths" in names:
            arguments[names["lengths"]] = real.sum(1)
        elif real is not None and "mask" in names:
            arguments[names["mask"]] = (~real if self.mask_marks_padding else real).to(self.mask_dtype)
        lengths = [ids.shape[1]] * len(ids) if real is None else real.sum(1).tolist()
        eos = settings.get("eos", 0)
        ends = _Ends(lengths if self.returns_prompt else [0] * len(ids), eos, settings.get("pad", eos))
        found = self._call(module, arguments, len(ids), ends)
        found = found.to(ids.device)
        # A generator that ends at once has yielded no prompt either.
        return found if self.returns_prompt and found.shape[1] else torch.cat((ids, found), 1)

    def new_tokens(self, found: Tensor, real: Tensor) -> list[Tensor]:
        """What follows each row's prompt in ``found`` (B, L), for prompts padded as in ``real`` (B, T)."""
        if self.follows_padding or not bool(real[:, 0].all()):
            return list(found[:, real.shape[1] :])
        return [row[length:] for row, length in zip(found, real.sum(1).tolist(), strict=True)]

    def _formed(self, ids: Tensor) -> Tensor | list[int] | list[list[int]]:
        if self.form == "rows":
            return ids
        if self.form == "lists":
            return list(ids.tolist())
        if len(ids) != 1:
            raise SubjectError(f"{self.entry} takes one prompt at a time, and no {len(ids)} rows")
        return ids[0] if self.form == "row" else list(ids[0].tolist())

    def _call(self, module: nn.Module, arguments: Mapping[str, Any], rows: int, ends: _Ends) -> Tensor:
        with torch.no_grad(), _quiet():
            returned = self.entry.of(module)(**arguments)
            if isinstance(returned, Iterator):
                found = [_ids_of_step(step) for step in returned]
            else:
                found = _ids_among(getattr(returned, "sequences", returned))
        if self.ragged and isinstance(found, list) and all(isinstance(row, list) for row in found):
            found = ends.equally_long(found)
        ids = _joined(found, rows) if isinstance(found, list) else _as_rows(found, rows)
        if ids is None or ids.dim() != 2:
            kind = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(returned).__name__
            raise SubjectError(f"{self.entry} returned {kind}: expected token ids (batch, length)")
        return ids.clone()  # no longer of inference mode


def _without_padding(ids: Tensor, real: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, real, strict=True)]


def _ids_among(found: Any) -> Any:
    """The token ids of a tuple or dict that holds more: its first tensor, or else list, of integers."""
    if not isinstance(found, (tuple, Mapping)):
        return found
    parts = list(found.values() if isinstance(found, Mapping) else found)
    tensors = [part for part in parts if isinstance(part, Tensor) and _holds_ids(part)]
    return next(iter([*tensors, *filter(_lists_ids, parts)]), found)


def _ids_of_step(step: Any) -> Any:
    """As :func:`_ids_among`, or the number that a tuple begins with.

    Beside a text or another number it may as well count the steps.
    """
    found = _ids_among(step)
    if found is not step or not isinstance(step, tuple):
        return found
    first, *others = step
    return first if type(first) is int and not {type(other) for other in others} & {int, str} else step


def _lists_ids(part: Any) -> bool:
    """Whether it is a list of numbers or of lists of them, and no cache of a layer each."""
    return isinstance(part, list) and all(type(item) is int or _lists_ids(item) for item in part)


def _holds_ids(part: Tensor) -> bool:
    return not (part.is_floating_point() or part.is_complex() or part.dtype == torch.bool)


def _joined(parts: list[Any], rows: int) -> Tensor | None:
    """Token ids (B, L) of a list of them, a list a row, or what was yielded step by step: new tokens, or all so far.

    Nothing at all is no new token of any row.
    """
    if all(isinstance(part, list) for part in parts):
        lists = parts or [[]] * rows
        dtype = None if any(lists) else torch.int64  # or nothing would be floating point
        return torch.tensor(lists, dtype=dtype) if len({len(one) for one in lists}) == 1 else None
    steps = [step for part in parts if (step := _as_rows(part, rows)) is not None]
    if not steps or len(steps) < len(parts) or len({len(step) for step in steps}) > 1:
        return None
    longer = all(after.shape[1] > before.shape[1] for before, after in itertools.pairwise(steps))
    return steps[-1] if longer else torch.cat(steps, 1)


def _as_rows(part: Any, rows: int) -> Tensor | None:
    """Token ids as (B, L): a number, one of each row, or all of one row."""
    if isinstance(part, int):
        return torch.tensor([[part]])
    if not isinstance(part, Tensor) or part.dim() > 2 or not _holds_ids(part):
        return None
    if part.dim() == 2:
        return part
    return part.reshape(1, -1) if rows == 1 else part.reshape(-1, 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings, of settings that do not go together or of padding: the checks judge what comes of them."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
