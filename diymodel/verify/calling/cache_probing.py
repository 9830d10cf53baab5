"""Finds how a module's cache is made, handed over and continued, by trying."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM, Past
from diymodel.verify.calling.cache_kept import forgets_tokens
from diymodel.verify.calling.cache_makers import (
    after,
    by_classes,
    by_method,
    makers_on,
    one_none_a_layer,
    reset_on,
    two_none_a_layer,
)
from diymodel.verify.calling.cache_of_generate import generate_places_tokens, ways_of_generate
from diymodel.verify.calling.entering import find_entered
from diymodel.verify.calling.installing import find_installed
from diymodel.verify.calling.signature import has_no, required_parameters
from diymodel.verify.convention import Convention
from diymodel.verify.failure import NotApplicable, crashed, refusal, said
from diymodel.verify.held import tensors_in

_MADE_BY_CALLER = "if the caller makes it, say how in Subject(…, new_cache=lambda module, config, rows: …)"


def close(seen: Tensor, expected: Tensor) -> bool:
    """Whether they are the same as far as finding a convention goes, and anything; bugs are for the checks."""
    return bool(expected.numel()) and bool(((seen - expected).abs() <= 1e-4 * expected.abs().max()).all())


def find_cache(
    module: nn.Module,
    config: DIYConfig,
    convention: Convention,
    ids: Tensor,
    factory: Callable[..., Any] | None = None,
) -> tuple[Convention, dict[str, str]]:
    """How a cache is begun and continued; what is missing, with the reason.

    Where its caller makes it, classes of caches are looked for near the module's and near ``factory``.
    """
    if forgets_tokens(module, config, convention, ids) or not (convention.past or convention.cache_on_module):
        found = find_installed(module, config, convention, ids) or find_entered(module, config, convention, ids)
        if found is None:
            return _without_cache(module, convention)
        convention = found
    convention, why = _find_new_cache(module, config, convention, ids, factory)
    if why is not None and not convention.past and (installed := find_installed(module, config, convention, ids)):
        convention, why = _find_new_cache(module, config, installed, ids, factory)
    if why is not None:
        return convention, dict.fromkeys(("cache", "chunks"), why)
    convention = _given_all(module, config, _not_told_where(module, config, convention, ids), ids)
    missing = {}
    if convention.cached_entry:
        missing["padded_cache"] = f"{convention.cached_entry} takes no mask"
    elif convention.mask:
        covers, refused = _mask_on_cache(module, config, convention, ids)
        convention = replace(convention, mask_covers_cache=covers)
        if refused is not None:
            missing["padded_cache"] = f"with forward({convention.mask}=…) a call on the cache is refused: {refused}"
        elif not (covers or convention.lengths or convention.left):
            missing["padded_cache"] = (
                f"forward({convention.mask}=…) covers the new tokens only, not the padding in the cache"
            )
        elif (why := _right_padding_refused(LM(module, config, convention), ids)) is not None:
            missing["right_padded_cache"] = f"padding on the right is refused by a call on the cache: {why}"
    lm = LM(module, config, convention)
    if convention.one_at_a_time:
        every = "every call is on the cache, and" if convention.always_cached else "a call on the cache"
        missing["chunks"] = f"{every} takes one token at a time"
    elif (error := _on_chunks(lm, ids)) is not None and not crashed(error):
        missing["chunks"] = f"several tokens on a cache are refused: {said(error)}"
    elif error is not None:  # such as a mask that does not fit
        convention = replace(convention, chunks_crash=True)
    elif _takes_the_last_alone(lm, ids):
        missing["chunks"] = "of several tokens, a call on the cache takes the last one alone"
    if convention.cache_on_module and (why := _uncached_refused(lm, ids)) is not None:
        missing["uncached_again"] = f"once the module has a cache, a call without it is refused: {why}"
    return convention, missing


def _without_cache(module: nn.Module, convention: Convention) -> tuple[Convention, dict[str, str]]:
    """The convention, and why there is no cache."""
    emptied = next((name for name, value in convention.extra.items() if value is None), None)
    why = f"forward({emptied}=…) does not take what comes back" if emptied else has_no(module, "past_key_values")
    if (told := convention.start or convention.use_cache) and convention.cache_on_module:
        why = f"forward({told}=…) leaves nothing on the module for a later call to go on with"
        always = convention.start is not None and convention.new_cache is not None
        convention = replace(convention, cache_on_module=False, always_cached=always)
    return convention, dict.fromkeys(("cache", "chunks"), why)


class _Tried(NamedTuple):
    """What came of beginning a cache and adding a token."""

    way: Convention
    why_not: str | None = None  # None: it went well
    crashed: bool = False  # on the token, by a mistake of the module's


def _find_new_cache(
    module: nn.Module,
    config: DIYConfig,
    convention: Convention,
    ids: Tensor,
    factory: Callable[..., Any] | None,
) -> tuple[Convention, str | None]:
    """The first way to a cache that a token can be added to; else why there is none.

    Where a cache is begun and the next token crashes, that is no lack but a bug: the checks will show it. Where it is
    refused, or wrong while the module's own generate gives positions, they are given with the cache, if the step is
    right by them.
    """
    ways = [convention]
    if convention.past and convention.new_cache is None:
        ways = [replace(convention, new_cache=by_method(name)) for name in makers_on(module)]
        others = [two_none_a_layer] if convention.past_values else [*by_classes(module, factory), one_none_a_layer]
        ways += [convention, *(replace(convention, new_cache=maker) for maker in others)]
    if convention.new_tokens:  # older versions know no such argument
        ways += [replace(way, new_tokens=None) for way in ways]
    tried = []
    for way in ways:
        tried.append(_tried(module, config, way, ids))
        if tried[-1].why_not is None:
            return _placed_as_by_generate(module, config, tried[-1].way, ids), None
    crashing = next((one.way for one in tried if one.crashed), None)
    for way in ways if crashing is None and not convention.one_at_a_time else ():
        if way.new_cache is not None:
            one = _tried(module, config, replace(way, one_at_a_time=True), ids)
            if one.why_not is None:
                return one.way, None
            if one.crashed and convention.new_cache is not None:  # its author says that this is the cache
                crashing = one.way
    if convention.past and convention.new_cache is None:
        for way in _placed_on_cache(ways) if crashing is None else ():
            found = _tried(module, config, way, ids)
            if found.why_not is None and _continues(module, config, found.way, ids):
                return found.way, None
        for way in ways_of_generate(module, config, convention):
            for fed in (way, replace(way, one_at_a_time=True)):
                found = _tried(module, config, fed, ids)
                if found.why_not is None:
                    return found.way, None
                crashing = crashing or (found.way if found.crashed else None)
    if crashing is not None:
        return crashing, None
    return convention, tried[ways.index(convention)].why_not


def _placed_as_by_generate(module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor) -> Convention:
    """The way, with positions on the cache where only these are right and the module's own generate gives them."""
    if way.positions is None or _continues(module, config, way, ids):
        return way
    placed = (_tried(module, config, other, ids) for other in _placed_on_cache([way]))
    right = (one.way for one in placed if one.why_not is None and _continues(module, config, one.way, ids))
    found = next(right, None)
    return way if found is None or not generate_places_tokens(module, config, way) else found


def _placed_on_cache(ways: Sequence[Convention]) -> Iterator[Convention]:
    """The ways, with the positions of new tokens in calls on the cache: the first as a number, of all, of each row."""
    for way in ways:
        if way.positions and not way.positions_always:
            yield replace(way, start=way.positions, positions=None, placed_on_cache=True)
            yield replace(way, positions_are_shared=True, placed_on_cache=True)
            yield replace(way, positions_are_shared=False, placed_on_cache=True)


def _tried(module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor) -> _Tried:
    way = _begun_anew(module, config, way, ids)
    lm = LM(module, config, way)
    begun: Past | None = None
    try:
        _, begun = lm.extend(ids[:, :1] if way.one_at_a_time else ids)
        if (kept := tensors_in(begun.cache)) and not any(tensor.numel() for tensor in kept):
            return _Tried(way, f"forward({way.past}=…) of a few tokens hands back tensors without elements")
        _, past = lm.extend(ids[:, :1], begun)
    except NotApplicable:
        why = f"forward({way.past}=…) handed no cache back: {_MADE_BY_CALLER}"
        return _Tried(way, why)
    except Exception as error:  # a stranger's forward may raise anything
        why = f"a cached call failed: {said(error)}{_needs_more(way, begun is not None)}"
        if begun is None or not crashed(error):
            return _Tried(way, why)
        return _Tried(replace(way, cache_is_value=not way.cache_on_module and _is_value(begun.cache)), why, True)
    if way.new_cache in (one_none_a_layer, two_none_a_layer) and not tensors_in(past.cache):
        return _Tried(way, f"forward({way.past}=…) passes over what it is handed")
    changed = way.cache_on_module or (way.new_cache is not None and _is_same(way, past, begun))
    way = replace(way, cache_is_value=not changed and _is_value(past.cache))
    return _Tried(replace(way, cache_is_new_part=_new_part(begun, past) if way.cache_is_value else None))


def _is_same(way: Convention, later: Past, earlier: Past) -> bool:
    """Whether a cache is what it was; as a pair, keys and values."""
    if way.past_values is None:
        return later.cache is earlier.cache
    return all(map(operator.is_, later.cache, earlier.cache))


def _begun_anew(module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor) -> Convention:
    """The way, and before each new sequence the module's method to reset, where a new cache alone begins none."""
    reset = reset_on(module)
    if reset is None or way.cache_on_module:
        return way
    lm = LM(module, config, way)

    def begun() -> Tensor | None:
        try:
            return lm.extend(ids)[0]
        except Exception:  # it may raise anything, one that counts on where it has come to the end
            return None

    refusal(getattr(module, reset))
    first, second = begun(), begun()
    if first is None or (second is not None and torch.allclose(first, second)):
        return way
    return replace(way, new_cache=after(reset, way.new_cache), position_on_module=True)


def _needs_more(way: Convention, begun: bool) -> str:
    """What to write where a cache asks for more than its caller is known to give, as torchtune's does on the module."""
    if not way.cache_on_module:
        return "" if begun or way.past is None or way.new_cache is not None else f"; {_MADE_BY_CALLER}"
    given = ", ".join(name for name in (way.ids, way.positions, way.start, way.use_cache) if name)
    return f"; it was given {given}: name a module instead, whose forward(tokens, start_pos) adds what it needs"


def _continues(
    module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor, cached: Tensor | None = None
) -> bool:
    """Whether the last token, on a cache of the others (of ``cached`` in their place), gives its uncached logits."""
    lm = LM(module, config, way)
    stem = ids[:, :-1]
    try:
        _, past = lm.extend(stem if cached is None else cached)
        logits, _ = lm.extend(ids[:, -1:], past._replace(tokens=stem) if way.cached_gets_all else past)
        return close(logits[:, -1], lm.logits(ids)[:, -1])
    except Exception:  # a stranger's forward may raise anything
        return False


def _on_chunks(lm: LM, ids: Tensor) -> Exception | None:
    """What the module raises where several tokens are added to a cache."""
    try:
        lm.extend(ids[:, :2], lm.extend(ids)[1])
    except Exception as error:  # a stranger's forward may raise anything
        return error
    return None


def _uncached_refused(lm: LM, ids: Tensor) -> str | None:
    """What an uncached call says after one on the cache, as torchtune's that then wants positions; a crash is none."""
    try:
        lm.extend(ids)
        lm.logits(ids)
    except Exception as error:  # a stranger's forward may raise anything
        return None if crashed(error) else said(error)
    return None


def _takes_the_last_alone(lm: LM, ids: Tensor) -> bool:
    """Whether two tokens on a cache are to it as the second is; with a bug of positions or masks they differ."""
    try:
        both, _ = lm.extend(ids[:, :2], lm.extend(ids)[1])
        last, _ = lm.extend(ids[:, 1:2], lm.extend(ids)[1])
    except Exception:  # a stranger's forward may raise anything, such as one that a call before brought to its end
        return False
    return both.shape[1] == 1 and (lm.convention.cached_gets_all or torch.equal(both, last))


def _given_all(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """The convention, with the whole sequence in each call on a cache where the next token is right only so.

    It must be by what the cache holds: a module that makes nothing of it is right on the whole sequence as well.
    """
    if convention.cache_on_module or _continues(module, config, convention, ids):
        return convention
    whole, others = replace(convention, cached_gets_all=True), (ids[:, :-1] + 1) % config.vocab_size
    reads = _continues(module, config, whole, ids) and not _continues(module, config, whole, ids, others)
    return whole if reads else convention


def _not_told_where(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """The convention, without where new tokens start if the next one is right only so.

    nanoGPT-Modern's forward counts what is cached itself, and is told by it how many tokens a rolling cache has lost.
    """
    if convention.start is None or convention.cache_on_module or convention.start in required_parameters(module):
        return convention
    untold = replace(convention, start=None)
    right = not _continues(module, config, convention, ids) and _continues(module, config, untold, ids)
    return untold if right else convention


def _mask_on_cache(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[bool, str | None]:
    """Whether a call on a cache takes a mask of cached and new tokens, else of the new ones only; or why neither.

    Modules refuse the wrong one, or misread it: in a row that is padded on the left, it then changes the logits. Some
    refuse such rows, with a cache or without: whether a mask is taken at all, one that hides nothing tells.
    """
    prompt, token = ids.roll(1, 1), ids[:, -1:]
    prompt[:, 0] = ids[:, 0]  # what stands at the padding
    all_real = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)
    padded = all_real.clone()
    padded[:, 0] = False
    accepted: list[bool] = []
    refusals: list[Exception] = []
    for real, expected in ((padded, prompt[:, 1:]), (all_real, prompt)):
        for covers in (True, False):
            lm = LM(module, config, replace(convention, mask_covers_cache=covers))
            try:
                alone, _ = lm.extend(token, lm.extend(expected)[1])
                seen, _ = lm.extend(token, lm.extend(prompt, None, real[:, :-1])[1], real)
            except Exception as error:  # why does not matter where another is accepted
                refusals.append(error)
                continue
            if close(seen, alone):
                return covers, None
            accepted.append(covers)
        if accepted:
            return accepted[0], None
    return True, None if any(map(crashed, refusals)) else said(refusals[0])


def _right_padding_refused(lm: LM, ids: Tensor) -> str | None:
    """What a call on a cache of rows padded on the right says against their mask, as x-transformers' of 2024 does."""
    real = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)
    real[0, -2] = False
    try:
        lm.extend(ids[:, -1:], lm.extend(ids, None, real[:, :-1])[1], real)
    except Exception as error:  # a stranger's forward may raise anything
        return None if crashed(error) else said(error)
    return None


def _new_part(begun: Past, later: Past) -> int | None:
    """The dimension along which a cache holds the tokens of the last call alone; None: it holds all, or none has it.

    Args:
        begun: after a call with several tokens.
        later: after one more.
    """
    first, second = ([t for t in tensors_in(past.cache) if t.dim()] for past in (begun, later))
    if [t.dim() for t in first] != [t.dim() for t in second]:
        return None
    pairs = list(zip(first, second, strict=True))
    grown = {
        tuple(dim - old.dim() for dim in range(old.dim()) if old.shape[dim] != new.shape[dim]) for old, new in pairs
    }
    if len(grown) != 1 or len(dims := grown.pop()) != 1:
        return None
    (dim,) = dims
    sizes = {(old.shape[dim], new.shape[dim]) for old, new in pairs}
    return dim if sizes == {(begun.length, later.length - begun.length)} else None


def _is_value(past: Any) -> bool:
    """Whether a cache is built of containers and tensors only, which promise not to change once handed out."""
    if isinstance(past, Mapping):
        return all(_is_value(item) for item in past.values())
    if isinstance(past, (tuple, list)):
        return all(_is_value(item) for item in past)
    return past is None or isinstance(past, (Tensor, int, float))
