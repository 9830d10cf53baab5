"""Finds how a module's cache is made, handed over and continued, by trying."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM, Convention, NewCache, Past
from diymodel.verify.calling.signature import has_no
from diymodel.verify.failure import NotApplicable, crashed, refusal, said
from diymodel.verify.held import tensors_in, tensors_on

_MAKERS = (
    "setup_caches",
    "setup_cache",
    "set_kv_cache",
    "setup_kv_cache",
    "make_cache",
    "make_kv_cache",
    "new_cache",
    "init_cache",
    "init_kv_cache",
    "create_cache",
    "empty_cache",
    "init_state",
    "init_hidden",
)
_RESETS = ("reset_kv_cache", "reset_cache", "clear_kv_cache", "clear_cache", "reset_caches", "clear_caches")
_SIZES = ("max_seq_length", "max_batch_size")  # what gpt-fast remembers of its caches, and sets none up again for

# What makers of caches call the sizes they ask for; the first group of heads is tried before the second.
_ROWS = ("batch_size", "max_batch_size", "bsz", "bs", "batch", "rows", "B", "b")
_POSITIONS = ("max_seq_length", "max_seq_len", "seq_len", "max_length", "max_len", "length", "context_length", "max_t")
_LAYERS = ("num_layers", "n_layers", "n_layer", "num_hidden_layers", "layers", "depth")
_HEADS = (
    *("num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_heads", "num_kv_groups", "n_kv_groups"),
    *("num_heads", "n_heads", "n_head", "heads"),
)
_HEAD_SIZE = ("head_dim", "head_size", "dim_head", "d_head")
_CONFIG = ("config", "cfg", "args", "params")


def close(seen: Tensor, expected: Tensor) -> bool:
    """Whether they are the same as far as finding a convention goes; bugs are for the checks."""
    return bool(((seen - expected).abs() <= 1e-4 * expected.abs().max()).all())


def cache_on_module(module: nn.Module, names: Mapping[str, Any]) -> dict[str, Any]:
    """The convention of a module that keeps its cache, if it has a method or a parameter that says so."""
    if names.get("start"):
        return {"cache_on_module": True, "always_cached": "use_cache" not in names}
    maker = next((name for name in _MAKERS if hasattr(module, name)), None)
    reset = _reset_of(module)
    if maker is not None and names.get("positions"):
        found = {"cache_on_module": True, "new_cache": _set_up(maker, reset), "positions_are_shared": True}
        return found | {"always_cached": bool(names.get("block_mask"))}
    if reset is not None and names.get("use_cache"):
        return {"cache_on_module": True, "new_cache": _method(reset)}
    if reset is not None and names.get("positions"):  # lit-llama, which makes its cache in the first call on it
        return {"cache_on_module": True, "new_cache": _emptied(reset), "positions_are_shared": True}
    return {}


def always_cached_ways(module: nn.Module, convention: Convention) -> list[Convention]:
    """The ways to call a module that makes its caches by a method, where no call goes without one."""
    always = replace(convention, causal=None, always_cached=True)
    if convention.always_cached or convention.new_cache is not None:
        return [] if convention.always_cached else [always]
    return [replace(always, new_cache=maker) for maker in _methods(module)] if convention.past else []


def one_none_a_layer(module: nn.Module, config: DIYConfig, rows: int) -> list[None]:
    """An empty cache that the module fills layer by layer."""
    return [None] * config.num_layers


def find_cache(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[Convention, dict[str, str]]:
    """How a cache is begun and continued; what is missing, with the reason."""
    if not convention.past and not convention.cache_on_module:
        return convention, dict.fromkeys(("cache", "chunks"), has_no(module, "past_key_values"))
    if convention.start and convention.cache_on_module and not _keeps_tokens(module, config, convention, ids):
        nothing = f"forward({convention.start}=…) leaves nothing on the module for a later call to go on with"
        without = replace(convention, cache_on_module=False, always_cached=False)
        return without, dict.fromkeys(("cache", "chunks"), nothing)
    convention, why = _find_new_cache(module, config, convention, ids)
    if why is not None:
        return convention, dict.fromkeys(("cache", "chunks"), why)
    convention = _given_all(module, config, convention, ids)
    missing = {}
    if convention.mask:
        covers, refused = _mask_on_cache(module, config, convention, ids)
        convention = replace(convention, mask_covers_cache=covers)
        if refused is not None:
            missing["padded_cache"] = f"with forward({convention.mask}=…) a call on the cache is refused: {refused}"
        elif not (covers or convention.lengths or convention.left):
            missing["padded_cache"] = (
                f"forward({convention.mask}=…) covers the new tokens only, not the padding in the cache"
            )
    lm = LM(module, config, convention)
    if (why := refusal(lambda: lm.extend(ids[:, :2], lm.extend(ids)[1]))) is not None:
        missing["chunks"] = f"several tokens on a cache are refused: {why}"
    elif convention.cached_gets_all and lm.extend(ids[:, :2], lm.extend(ids)[1])[0].shape[1] < 2:
        missing["chunks"] = "of the whole sequence, a call on the cache takes the last token alone as new"
    return convention, missing


def _find_new_cache(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[Convention, str | None]:
    """The first way to a cache that a token can be added to; else why there is none.

    Where a cache is begun and the next token crashes, that is no lack but a bug: the checks will show it.
    """
    ways = [convention]
    if convention.past and convention.new_cache is None:
        ways = [replace(convention, new_cache=maker) for maker in _methods(module)]
        ways += [convention, *(replace(convention, new_cache=maker) for maker in (*_classes(module), one_none_a_layer))]
    if convention.new_tokens:  # older versions know no such argument
        ways += [replace(way, new_tokens=None) for way in ways]
    reasons = []
    crashing: Convention | None = None
    for way in ways:
        way = _begun_anew(module, config, way, ids)
        lm = LM(module, config, way)
        begun: Past | None = None
        try:
            _, begun = lm.extend(ids)
            _, past = lm.extend(ids[:, :1], begun)
        except NotApplicable:
            reasons.append(
                f"forward({convention.past}=…) handed no cache back: if the caller makes it, say how in "
                "Subject(…, new_cache=lambda module, config, rows: …)"
            )
        except Exception as error:  # a stranger's forward may raise anything
            reasons.append(f"a cached call failed: {said(error)}{_needs_more(way)}")
            if begun is not None and crashed(error):
                crashing = crashing or replace(way, cache_is_value=not way.cache_on_module and _is_value(begun.cache))
        else:
            if way.new_cache is not None and not (way.cache_on_module or tensors_in(past.cache)):
                reasons.append(f"forward({way.past}=…) put nothing into the cache that it was handed")
                continue
            changed = way.cache_on_module or (way.new_cache is not None and past.cache is begun.cache)
            way = replace(way, cache_is_value=not changed and _is_value(past.cache))
            return replace(way, cache_is_new_part=_new_part(begun, past) if way.cache_is_value else None), None
    if crashing is not None:
        return crashing, None
    return convention, reasons[0] if len(ways) == 1 else reasons[ways.index(convention)]


def _begun_anew(module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor) -> Convention:
    """The way, and before each new sequence the module's method to reset, where a new cache alone begins none."""
    reset = _reset_of(module)
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
    return replace(way, new_cache=_after(reset, way.new_cache), position_on_module=True)


def _needs_more(way: Convention) -> str:
    """What to write where a cache on the module asks for more than its caller is known to give, as torchtune's does."""
    if not way.cache_on_module:
        return ""
    given = ", ".join(name for name in (way.ids, way.positions, way.start, way.use_cache) if name)
    return f"; it was given {given}: name a module instead, whose forward(tokens, start_pos) adds what it needs"


def _given_all(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """The convention, with the whole sequence in each call on a cache where the next token is right only so.

    It must be by what the cache holds: a module that makes nothing of it is right on the whole sequence as well.
    """
    if convention.cache_on_module:
        return convention

    def next_logits(way: Convention, cached: Tensor) -> Tensor | None:
        lm = LM(module, config, way)
        try:
            _, past = lm.extend(cached)
            tokens = ids[:, :-1] if way.cached_gets_all else None
            return lm.extend(ids[:, -1:], past._replace(tokens=tokens))[0][:, -1]
        except Exception:  # a stranger's forward may raise anything
            return None

    def is_right(seen: Tensor | None) -> bool:
        return seen is not None and close(seen, expected)

    expected = LM(module, config, convention).logits(ids)[:, -1]
    if is_right(next_logits(convention, ids[:, :-1])):
        return convention
    whole = replace(convention, cached_gets_all=True)
    others = (ids[:, :-1] + 1) % config.vocab_size
    reads = is_right(next_logits(whole, ids[:, :-1])) and not is_right(next_logits(whole, others))
    return whole if reads else convention


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


def _keeps_tokens(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether a call changes what the module holds, other than by making it, or by the same whatever the tokens are."""

    def after(tokens: Tensor) -> list[Tensor]:
        LM(module, config, convention).extend(tokens)
        return [tensor.clone() for tensor in tensors_on(module)]

    try:
        first, second = after(ids), after((ids + 1) % config.vocab_size)
    except Exception:  # a stranger's forward may raise anything; who tries it next tells what
        return True
    return len(first) != len(second) or any(not torch.equal(*pair) for pair in zip(first, second, strict=True))


# --- what the caller has to call -------------------------------------------------------------------------------------


def _set_up(maker: str, reset: str | None) -> NewCache:
    """Clears the cache on the module and sets it up for so many rows, in the module's dtype where it takes one."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        if reset is not None:
            refusal(getattr(module, reset))  # torchtune refuses before the first set-up, when nothing is there to reset
        else:
            for name in _SIZES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, -1)
        _call(getattr(module, maker), module, config, rows, config.kv_heads)

    return new_cache


def _method(name: str) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        return _call(getattr(module, name), module, config, rows, config.kv_heads)

    return new_cache


def _emptied(reset: str) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        refusal(getattr(module, reset))  # before the first call there may be nothing to reset

    return new_cache


def _after(reset: str, maker: NewCache | None) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        getattr(module, reset)()
        return None if maker is None else maker(module, config, rows)

    return new_cache


def _reset_of(module: nn.Module) -> str | None:
    return next((name for name in _RESETS if hasattr(module, name)), None)


def _methods(module: nn.Module) -> Iterator[NewCache]:
    return (_method(name) for name in _MAKERS if hasattr(module, name))


def _classes(module: nn.Module) -> Iterator[NewCache]:
    """Caches of the classes that stand beside the module's own: one, or a list of one a layer."""
    beside = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    for found in (found for name, found in beside.items() if "cache" in name.lower() and inspect.isclass(found)):
        for heads in ("kv_heads", "num_heads"):
            for a_layer in (False, True):
                yield _instances(found, heads, a_layer)


def _instances(made: type, heads: str, a_layer: bool) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        caches = [_call(made, module, config, rows, getattr(config, heads)) for _ in range(config.num_layers)]
        return caches if a_layer else caches[0]

    return new_cache


def _call(maker: Callable[..., Any], module: nn.Module, config: DIYConfig, rows: int, heads: int) -> Any:
    """Call a maker of caches with the sizes that it asks for, by the names of its parameters."""
    parameter = next(module.parameters())
    sizes = {
        _ROWS: rows,
        _POSITIONS: config.max_seq_len,
        _LAYERS: config.num_layers,
        _HEADS: heads,
        _HEAD_SIZE: config.head_size,
        _CONFIG: getattr(module, "config", config),
        ("device",): parameter.device,
        ("dtype",): parameter.dtype,
    }
    known = {name: value for names, value in sizes.items() for name in names}
    asked = inspect.signature(maker).parameters
    return maker(**{name: value for name, value in known.items() if name in asked})


# --- what a cache is made of -----------------------------------------------------------------------------------------


def is_narrower(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether what is kept between calls has less precision than the module: rounding of that size is then no bug."""
    lm = LM(module, config, convention)
    lm.logits(ids)  # what it makes in any first call, such as a table of positions, is no cache
    before = [(kept, kept.clone()) for kept in tensors_on(module)]
    _, past = lm.extend(ids)
    same = {id(kept) for kept, copy in before if torch.equal(kept, copy)}
    kept = [*tensors_in(past.cache), *(kept for kept in tensors_on(module) if id(kept) not in same)]
    return any(t.is_floating_point() and t.dtype.itemsize < convention.dtype.itemsize for t in kept)
