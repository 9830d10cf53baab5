"""Finds how a stranger's module is called: by the names of ``forward``'s parameters, and by trying each once.

Shapes: B batch, T query length, S key length (cached + T), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import IGNORED, LM, Convention, NewCache
from diymodel.verify.failure import NotApplicable, SubjectError

_NAMES = {
    "ids": ("input_ids", "idx", "tokens", "token_ids", "in_idx", "x", "inputs", "input"),
    "mask": ("attention_mask", "padding_mask", "mask"),
    "lengths": ("seq_lengths", "lengths"),
    "left": ("seq_start_pos",),
    "positions": ("position_ids", "input_pos", "positions"),
    "start": ("start_pos", "start_position"),
    "past": ("past_key_values", "past_kv", "past", "cache", "kv_cache", "layer_past"),
    "use_cache": ("use_cache", "return_intermediates"),
    "labels": ("labels", "targets", "target"),
}
_MAKERS = ("setup_caches", "set_kv_cache", "make_cache", "new_cache", "init_cache", "setup_cache", "empty_cache")
_RESETS = ("reset_kv_cache", "reset_cache", "clear_kv_cache", "clear_cache", "reset_caches")
_AFTER = ("input_not_include_cache",)  # x-transformers: True where a call on a cache gets the new tokens only
_LABELS_SHIFTED = ("targets", "target")  # nanoGPT's name for labels that its caller shifts


def find_convention(build: Callable[[], nn.Module], config: DIYConfig, declared: Mapping[str, Any]) -> Convention:
    """Try a freshly built module, in eval mode, and record how it wants to be called.

    Args:
        build: makes a module of ``config``.
        declared: fields of :class:`Convention` that its author has stated; they are taken, not found.

    Raises:
        SubjectError: it cannot be called with token ids, or returns no logits.
    """
    module = build().eval()
    ids = torch.arange(2 * 4).view(2, 4) % config.vocab_size
    convention = _find_call(module, config, declared)
    with torch.no_grad():
        convention = _find_logits(module, config, convention, ids)
        if "dtype" not in declared:
            convention = replace(convention, dtype=_find_dtype(module, config, convention, ids))
        module = build().eval().to(convention.dtype)
        convention = replace(convention, shortest=_find_shortest(module, config, convention, ids))
        convention, missing = _find_padding(module, config, convention, ids)
        convention, found = _find_loss(module, config, convention, ids, declared)
        missing |= found
        convention, found = _find_cache(module, config, convention, ids)
        missing |= found
    missing |= _missing_gradient(module, config, convention, ids)
    return replace(convention, missing=missing)


def parameter_names(module: nn.Module) -> dict[str, str]:
    """The names that ``forward`` gives to what :class:`Convention` knows.

    Raises:
        SubjectError: it takes no token ids.
    """
    parameters = _parameters(module)
    found = {role: name for role, names in _NAMES.items() if (name := next((n for n in names if n in parameters), ""))}
    if not parameters:
        raise SubjectError("forward takes no arguments: expected forward(input_ids, …)")
    found.setdefault("ids", next(iter(parameters)))
    return found


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _find_call(module: nn.Module, config: DIYConfig, declared: Mapping[str, Any]) -> Convention:
    """What the names of parameters and methods tell."""
    parameters = _parameters(module)
    names: dict[str, Any] = {**parameter_names(module)}
    mask = parameters.get(names.get("mask", ""))
    if mask is not None and mask.default is mask.empty and "positions" in names:
        names["block_mask"] = names.pop("mask")
    if names.get("labels") in _LABELS_SHIFTED:
        names |= {"labels_come_shifted": True, "ignore_index": -1}
    if "return_intermediates" in parameters:
        names["cached_extra"] = {name: True for name in _AFTER if name in parameters}
    if "past" not in names and "new_cache" not in declared:
        names |= _cache_on_module(module, names)
    return Convention(**{**names, **declared})


def _cache_on_module(module: nn.Module, names: Mapping[str, str]) -> dict[str, Any]:
    """The convention of a module that keeps its cache, if it has a method or a parameter that says so."""
    if names.get("start"):
        return {"cache_on_module": True, "always_cached": True}
    maker = next((name for name in _MAKERS if hasattr(module, name)), None)
    reset = next((name for name in _RESETS if hasattr(module, name)), None)
    if maker is not None and names.get("positions"):
        return {"cache_on_module": True, "new_cache": _set_up(maker, reset), "always_cached": "block_mask" in names}
    if reset is not None and names.get("use_cache"):
        return {"cache_on_module": True, "new_cache": _call_method(reset)}
    return {}


def _set_up(maker: str, reset: str | None) -> NewCache:
    """Clears the cache on the module and sets it up for so many rows, in the module's dtype where it takes one."""

    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> None:
        if reset is not None:
            getattr(module, reset)()
        method = getattr(module, maker)
        parameter = next(module.parameters())
        known = {"device": parameter.device, "dtype": parameter.dtype, "max_seq_length": config.max_seq_len}
        takes = inspect.signature(method).parameters
        method(rows, **{name: value for name, value in known.items() if name in takes})

    return new_cache


def _call_method(name: str) -> NewCache:
    def new_cache(module: nn.Module, config: DIYConfig, rows: int) -> Any:
        return getattr(module, name)()

    return new_cache


def _find_logits(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """All positions' logits come without labels, or, as in nanoGPT, only with them."""
    shape: tuple[int, ...] = ()
    for need_labels in (False, True) if convention.labels else (False,):
        trial = replace(convention, logits_need_labels=need_labels)
        try:
            logits = LM(module, config, trial).logits(ids)
        except (SubjectError, NotApplicable):
            raise
        except Exception as error:  # a stranger's forward may raise anything
            raise SubjectError(f"forward failed on token ids: {_said(error)}") from error
        shape = tuple(logits.shape)
        if shape[:2] == tuple(ids.shape) and len(shape) == 3:
            return trial
    raise SubjectError(
        f"forward({convention.ids}) of shape {tuple(ids.shape)} gave logits of shape {shape}: expected "
        f"({ids.shape[0]}, {ids.shape[1]}, {config.vocab_size})"
    )


def _find_dtype(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> torch.dtype:
    """float64, unless the module refuses it."""
    try:
        logits = LM(module.double(), config, convention).logits(ids)
    except Exception:  # kernels and modules refuse in ways of their own; the report says which dtype was used
        return torch.float32
    return torch.float64 if bool(logits.isfinite().all()) else torch.float32


def _find_shortest(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> int:
    lm = LM(module, config, convention)
    return next((T for T in (1, 2, 3) if _refusal(lm.logits, ids[:, :T]) is None), ids.shape[1])


def _find_padding(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[Convention, dict[str, str]]:
    """A mask (B, T) of whole numbers or of booleans, or lengths; whether the mask of a cached call covers the cache."""
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    if convention.lengths or convention.mask:
        refusal = None
        for mask_dtype in (convention.mask_dtype, torch.bool):
            trial = replace(convention, mask_dtype=mask_dtype)
            refusal = _refusal(LM(module, config, trial).logits, ids, real)
            if refusal is None:
                missing = {}
                if not (convention.lengths or convention.positions):
                    missing["ragged_cache"] = "forward has no seq_lengths and no position_ids to continue short rows by"
                return trial, missing
        why = f"forward({convention.lengths or convention.mask}=…) does not take padding on the right: {refusal}"
    else:
        why = "forward has no attention_mask and no seq_lengths"
    return convention, dict.fromkeys(("padding", "ragged_cache"), why)


def _find_loss(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor, declared: Mapping[str, Any]
) -> tuple[Convention, dict[str, str]]:
    """Whether there is a loss and, where the name leaves it open, how it wants its labels."""
    if convention.loss is not None:
        return convention, {}
    if not convention.labels:
        return convention, {"loss": "forward has no labels"}
    candidates = [convention]
    if convention.labels in _LABELS_SHIFTED and not {"labels_come_shifted", "ignore_index"} & declared.keys():
        styles = ((True, -1), (True, IGNORED), (False, IGNORED), (False, -1))
        candidates = [replace(convention, labels_come_shifted=s, ignore_index=i) for s, i in styles]
    refusals = []
    for candidate in candidates:
        lm = LM(module, config, candidate)
        refusal = _refusal(lm.loss, ids, _half_ignored(ids))
        if refusal is None and (len(candidates) == 1 or _is_cross_entropy(lm, ids)):
            return candidate, {}
        refusals.append(refusal)
    if None in refusals:  # there is a loss, of no known kind: the checks will say how it is wrong
        return candidates[refusals.index(None)], {}
    return convention, {"loss": f"forward({convention.labels}=…) gave no loss: {refusals[0]}"}


def _half_ignored(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, ::2] = IGNORED
    return labels


def _is_cross_entropy(lm: LM, ids: Tensor) -> bool:
    labels = _half_ignored(ids)
    logits = lm.logits(ids)[:, :-1].flatten(0, 1).double()
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
    return bool(torch.isclose(lm.loss(ids, labels).double(), expected, rtol=1e-4))


def _find_cache(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[Convention, dict[str, str]]:
    if not convention.past and not convention.cache_on_module:
        return convention, dict.fromkeys(("cache", "chunks"), "forward has no past_key_values")
    if convention.past and convention.new_cache is None and hasattr(module, "make_cache"):
        convention = replace(convention, new_cache=_call_method("make_cache"))
    lm = LM(module, config, convention)
    try:
        _, past = lm.extend(ids)
        _, past = lm.extend(ids[:, :1], past)
    except NotApplicable:
        why = (
            f"forward({convention.past}=…) handed no cache back: if the caller makes it, say how in "
            "Subject(…, new_cache=lambda module, config, rows: …)"
        )
        return convention, dict.fromkeys(("cache", "chunks"), why)
    except Exception as error:  # a stranger's forward may raise anything
        why = f"a cached call failed: {_said(error)}"
        return convention, dict.fromkeys(("cache", "chunks"), why)
    convention = replace(convention, cache_is_value=not convention.cache_on_module and _is_value(past.cache))
    if convention.mask:
        convention = replace(convention, mask_covers_cache=_mask_covers_cache(module, config, convention, ids))
    lm = LM(module, config, convention)
    if (refusal := _refusal(lambda: lm.extend(ids[:, :2], lm.extend(ids)[1]))) is not None:
        return convention, {"chunks": f"several tokens on a cache are refused: {refusal}"}
    return convention, {}


def _mask_covers_cache(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether a call on a cache takes a mask of cached and new tokens; else of the new ones only."""
    lm = LM(module, config, replace(convention, mask_covers_cache=True))
    real = torch.ones(len(ids), ids.shape[1] + 1, dtype=torch.bool)
    return _refusal(lambda: lm.extend(ids[:, :1], lm.extend(ids, None, real[:, :-1])[1], real)) is None


def _is_value(past: Any) -> bool:
    """Whether a cache is built of containers and tensors only, which promise not to change once handed out."""
    if isinstance(past, Mapping):
        return all(_is_value(item) for item in past.values())
    if isinstance(past, (tuple, list)):
        return all(_is_value(item) for item in past)
    return past is None or isinstance(past, (Tensor, int, float))


def _missing_gradient(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> dict[str, str]:
    """A module with its cache in buffers is often for inference only."""

    def backward() -> None:
        for _ in range(2):
            LM(module, config, convention).logits(ids).sum().backward()  # type: ignore[no-untyped-call]

    with torch.enable_grad():
        refusal = _refusal(backward) if convention.cache_on_module else None
    module.zero_grad()
    return {} if refusal is None else {"gradient": f"the module cannot be trained as it is: {refusal}"}


def _refusal(call: Callable[..., object], *arguments: Any) -> str | None:
    """What the module says against a call; None: nothing."""
    try:
        call(*arguments)
    except Exception as error:  # a stranger's module may raise anything
        return _said(error)
    return None


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
