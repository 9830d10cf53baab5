"""What a module's own ``generate`` hands to ``forward``: its cache, where nothing else tells how one is made, and where
new tokens stand.

Shapes: B batch, T prompt length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.calling.entries import Entry, others
from diymodel.verify.calling.generate_names import by_names
from diymodel.verify.calling.generating import FORMS, Generating
from diymodel.verify.convention import Convention, NewCache
from diymodel.verify.failure import NotApplicable

_PROMPT = 2  # tokens


class _Begun(BaseException):
    """The call of ``forward`` that is waited for is about to be made; no error, so that nobody handles it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments


def ways_of_generate(module: nn.Module, config: DIYConfig, convention: Convention) -> Iterator[Convention]:
    """The convention with the cache, and with the switches, that each of its ways to generate begins with."""
    past = convention.past
    assert past is not None
    for generating, arguments in _calls(module, config, convention, lambda _: True):
        switches = {name: True for name, given in arguments.items() if given is True and name != convention.use_cache}
        made = arguments.get(past) is not None
        maker = _handed_over(generating, past, convention.past_values) if made else None
        if made or switches:
            yield replace(convention, new_cache=maker, cached_extra={**convention.cached_extra, **switches})


def generate_places_tokens(module: nn.Module, config: DIYConfig, convention: Convention) -> bool:
    """Whether one of its ways to generate says, in a call on the cache, where the new tokens stand."""

    def placed(arguments: Mapping[str, Any]) -> bool:
        return all(name and arguments.get(name) is not None for name in (convention.past, convention.positions))

    return any(True for _ in _calls(module, config, convention, placed))


def _calls(
    module: nn.Module, config: DIYConfig, convention: Convention, wanted: Callable[[Mapping[str, Any]], bool]
) -> Iterator[tuple[Generating, Mapping[str, Any]]]:
    """Each of its ways to generate, and the arguments of the first call of ``forward`` that is wanted."""
    for entry in (Entry(), *others(module, None)):
        generating = by_names(module, convention, entry)
        if "new_tokens" not in generating.names:
            continue
        for form in FORMS:
            arguments = _first_call(module, config, replace(generating, form=form), 1, wanted)
            if arguments is not None:
                yield replace(generating, form=form), arguments
                break


def _handed_over(generating: Generating, past: str, past_values: str | None) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        arguments = _first_call(module, config, generating, rows, lambda _: True)
        if arguments is None:
            raise NotApplicable(f"{generating.entry} takes no {rows} rows, and the cache is as it makes it")
        return arguments[past] if past_values is None else (arguments[past], arguments[past_values])

    return new_cache


def _first_call(
    module: nn.Module,
    config: DIYConfig,
    generating: Generating,
    rows: int,
    wanted: Callable[[Mapping[str, Any]], bool],
) -> Mapping[str, Any] | None:
    """The arguments, by name, of the first wanted call of ``forward`` that generate makes; None where it makes none."""
    prompts = torch.zeros(rows, _PROMPT, dtype=torch.int64, device=next(module.parameters()).device)
    settings = {"context": config.max_seq_len, "device": prompts.device, "use_cache": True}
    try:
        with _interrupted(module, wanted):
            generating.run(module, prompts, 2, None, settings)
    except _Begun as begun:
        return begun.arguments
    except Exception:  # a stranger's generate may raise anything
        return None
    return None


@contextmanager
def _interrupted(module: nn.Module, wanted: Callable[[Mapping[str, Any]], bool]) -> Iterator[None]:
    """``forward`` raises :class:`_Begun` where it is wanted; afterwards it, and every part's mode, are as before."""
    plain = module.forward
    before, modes = vars(module).get("forward"), [(part, part.training) for part in module.modules()]
    signature = inspect.signature(plain)

    def forward(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        if wanted(given):
            raise _Begun(given)
        return plain(*arguments, **named)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
        for part, mode in modes:
            part.training = mode
