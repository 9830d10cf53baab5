"""What a cache is to the one who holds it: rows that can be chosen, a dtype that stays, an object that is filled."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM, Past
from diymodel.verify.convention import NewCache
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_OWN_WAYS = ("reorder_cache", "batch_select_indices", "reorder")  # methods of a cache; the first as in transformers
_MODULES_WAYS = ("_reorder_cache", "reorder_cache")  # methods of a module: (cache, rows) -> cache


@check(
    "decode.rows_reordered",
    title="a cache whose rows are chosen, repeated or reordered goes on as those rows",
    step="3.2",
    needs=("cache", "cached_rows", "causal"),
    causes=("beam-reorder-skipped", "cache-rows-shared"),
)
def rows_reordered(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2, rows=trial.draw("batch", st.integers(2, 3)))
    B = ids.shape[0]
    rows = torch.tensor(trial.draw("order", st.lists(st.integers(0, B - 1), min_size=B, max_size=B)))
    stem, last = ids[:, :-1], ids[:, -1:]
    _, past = lm.extend(stem)
    reordered, by_hand = _reordered(lm, stem, past, rows.to(trial.device))
    try:
        logits, _ = lm.extend(last, reordered)  # once: forward may write into the cache that it is given
    except Exception as error:  # a stranger's forward may raise anything
        if not by_hand:
            raise
        raise NotApplicable(f"a cache whose rows were chosen by hand is refused: {said(error)}") from error
    whole = torch.cat((stem[rows], last), 1)
    what = f"on a cache of the rows {rows.tolist()} of {stem.tolist()}, the next tokens must give the uncached logits"
    trial.same(logits[:, -1], lm.logits(whole)[:, -1], what, lm, lambda: lm.logits(whole))


def _reordered(lm: LM, ids: Tensor, past: Past, rows: Tensor) -> tuple[Past, bool]:
    """The cache with other rows, in the way the subject has for it; True where it has none and it was done by hand.

    A method that is not implemented, such as the one that transformers' classes inherit, is no way.

    Raises:
        NotApplicable: there is no way.
    """
    if lm.convention.cache_on_module:
        raise NotApplicable("the cache is kept on the module, and nobody can choose its rows")
    if past.tokens is not None:
        past = past._replace(tokens=past.tokens[rows])
    for name in _OWN_WAYS:
        if hasattr(past.cache, name):
            with suppress(NotImplementedError):
                returned = getattr(past.cache, name)(rows)  # nothing, where it is done in place
                return past if returned is None else past._replace(cache=returned), False
    for name in _MODULES_WAYS:
        if hasattr(lm.module, name):
            with suppress(NotImplementedError):
                return past._replace(cache=getattr(lm.module, name)(past.cache, rows)), False
    if not lm.convention.cache_is_value:
        raise NotApplicable(f"its cache is an object without {' or '.join(_OWN_WAYS)}")
    _, larger = lm.extend(torch.cat((ids, ids[:1])))
    return past._replace(cache=_choose(past.cache, larger.cache, rows)), True


def _choose(value: Any, larger: Any, rows: Tensor) -> Any:
    """Rows of every tensor in nested containers, along the dimension in which that of a larger batch is larger."""
    if isinstance(value, Tensor):
        pairs = zip(value.shape, larger.shape, strict=True)
        batch = next((dim for dim, (size, more) in enumerate(pairs) if size != more), None)
        return value if batch is None else value.index_select(batch, rows)
    if isinstance(value, Mapping):
        return {name: _choose(item, larger[name], rows) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_choose(item, other, rows) for item, other in zip(value, larger, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@check(
    "decode.dtype",
    title="on a cache, logits have the dtype that they have without one",
    step="3.2",
    needs=("cache",),
    causes=("cache-dtype-promoted",),
)
def dtype(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    refusals = []
    for name in (torch.float32, torch.bfloat16):
        narrow = lm.twin()
        narrow.cast(name)
        try:
            expected = narrow.logits(ids).dtype
        except Exception as error:  # kernels and modules refuse narrow types in ways of their own
            refusals.append(f"the module does not run in {name}: {said(error)}")
            continue
        _, past = narrow.extend(ids[:, :-1])
        seen = narrow.extend(ids[:, -1:], past)[0].dtype
        if seen != expected:
            raise CheckFailure(
                f"in a module of {name}, a cached step must give logits of {expected} as an uncached call does, "
                f"saw {seen}"
            )
    if len(refusals) == 2:
        raise NotApplicable(refusals[0])


@check(
    "decode.caller_object",
    title="the cache object that the caller passes in is the one that is filled",
    step="3.2",
    needs=("cache",),
    causes=("cache-object-replaced",),
)
def caller_object(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    make = _maker_of_objects(trial, lm, ids)

    def run(goes_on_with_own: bool) -> Tensor:
        own = Past(make(lm.module, lm.config, ids.shape[0]), 0)
        _, past = lm.extend(ids[:, :-1], own)
        return lm.extend(ids[:, -1:], past._replace(cache=own.cache) if goes_on_with_own else past)[0]

    promised = trial.subject.missing("cache_filled") is None or trial.subject.convention.new_cache is None
    if not promised and _is_left_alone(lm, ids, make):
        raise NotApplicable("forward leaves the cache object it is given alone, and hands back another")
    what = "going on with the cache object that was passed in must give what the one that came back gives"
    trial.same(run(True), run(False), what, lm, lambda: run(False))


def _maker_of_objects(trial: Trial, lm: LM, ids: Tensor) -> NewCache:
    """What makes an empty cache for forward to fill.

    Raises:
        NotApplicable: the caller passes none, or a value.
    """
    convention = trial.subject.convention
    if convention.cache_on_module:
        raise NotApplicable("forward makes its cache itself")
    if trial.subject.missing("cache_value") is None:
        raise NotApplicable("its cache is a value, and the caller goes on with the one that comes back")
    return convention.new_cache or _maker_of_its_class(lm, ids)


def _maker_of_its_class(lm: LM, ids: Tensor) -> NewCache:
    """What makes an empty cache of the class that forward makes itself and adds to, as generate of transformers does.

    Raises:
        NotApplicable: there is none, or forward does not add to the object that it is handed.
    """
    _, begun = lm.extend(ids[:, :1])
    kind = type(begun.cache)
    own = "forward makes its cache itself"
    if kind.__module__ == "builtins" or lm.extend(ids[:, 1:], begun)[1].cache is not begun.cache:
        raise NotApplicable(own)

    def of_nothing(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        return kind()

    def of_its_config(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        return kind(module.config)

    for make in (of_nothing, of_its_config):
        if refusal(lambda: lm.extend(ids[:, :1], Past(make(lm.module, lm.config, len(ids)), 0))) is None:  # noqa: B023
            return make
    raise NotApplicable(own)


def _is_left_alone(lm: LM, ids: Tensor, make: NewCache) -> bool:
    """Whether a cache that was given the first token is to the second what a new one is, or fails as a new one does."""

    def second(cache: Any) -> Tensor | None:
        try:
            return lm.extend(ids[:, 1:2], Past(cache, 1))[0]
        except Exception:  # nothing is in it that it could go on with
            return None

    expected = second(make(lm.module, lm.config, ids.shape[0]))
    used = make(lm.module, lm.config, ids.shape[0])  # only now: a module that counts goes on with the last begun
    lm.extend(ids[:, :1], Past(used, 0))
    seen = second(used)
    return seen is expected if seen is None or expected is None else bool(torch.allclose(seen, expected))
