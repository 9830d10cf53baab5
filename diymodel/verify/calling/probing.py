"""Finds how a stranger's module is called: by the names of ``forward``'s parameters, and by trying each once.

Shapes: B batch, T query length, S key length (cached + T), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_kept import (
    always_cached_ways,
    cache_on_module,
    forgets_tokens,
    is_narrower,
    trains_on_cache,
)
from diymodel.verify.calling.cache_makers import one_none_a_layer, two_none_a_layer
from diymodel.verify.calling.cache_probing import close
from diymodel.verify.calling.cache_rows import find_cache_and_rows
from diymodel.verify.calling.loss_probing import find_loss, no_labelled_logits
from diymodel.verify.calling.masks import CAUSAL_MASKS
from diymodel.verify.calling.padding_probing import find_padding, mask_kinds, missing_packing, padded_is_finite
from diymodel.verify.calling.signature import (
    LABELS_SHIFTED,
    NAMES,
    logits_switches,
    parameter_names,
    parameters,
    required_parameters,
)
from diymodel.verify.calling.uncallable import (
    LENGTH,
    Tried,
    only_multiples,
    refuses_between,
    sample_ids,
    uncallable,
    wrong_logits,
)
from diymodel.verify.casting import cast
from diymodel.verify.convention import ROLES, Convention
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.failure import SubjectError, refusal, said_where

_PERHAPS_CAUSAL = ("mask", "masks", *NAMES["causal"])  # names of masks (T, S) as well
_AFTER = ("input_not_include_cache",)  # x-transformers: True where a call on a cache gets the new tokens only
_NEW_TOKENS = "cache_age"  # x-transformers, which hands it on by **kwargs


def find_convention(
    build: Callable[[], nn.Module],
    config: DIYConfig,
    declared: Mapping[str, Any],
    factory: Callable[..., Any] | None = None,
) -> Convention:
    """Try a freshly built module, in eval mode, and record how it wants to be called.

    Args:
        build: makes a module of ``config``.
        declared: fields of :class:`Convention` that its author has stated; they are taken, not found.
        factory: what it was asked of, beside which a class of caches may lie.

    Raises:
        SubjectError: it cannot be called with token ids, or returns no logits.
    """
    ids = sample_ids(config)

    def drawn(dtype: torch.dtype | None = None) -> nn.Module:
        """A new module; its constructor may have left the weights undefined, or a head at zero, which says nothing."""
        module = build()
        try:
            module.eval()
        except Exception as error:  # a stranger's module may raise anything
            raise SubjectError(f"eval() failed: {said_where(error)}") from error
        draw_weights(module, seed=0, sharpness=2)
        return module if dtype is None else cast(module, dtype, buffers=not convention.buffers_stay)

    def rest(dtype: torch.dtype) -> Convention:
        found = _find_rest(drawn(dtype), config, replace(convention, dtype=dtype), ids, declared, factory)
        return replace(found, **declared)

    module = drawn()
    with torch.no_grad():
        convention = _find_logits(module, config, _find_call(module, declared), ids, declared)
        if convention.always_cached and forgets_tokens(module, config, convention, ids):
            # Nothing is cached: such calls take labels and carry gradients, and with labels all logits may come.
            uncached = replace(convention, always_cached=False, last_only=False)
            convention = _find_logits(module, config, uncached, ids, declared)
        _refuse_lost_buffers(module, config, convention, ids)
        if _buffers_must_stay(drawn, config, convention, ids):
            convention = replace(convention, buffers_stay=True)
        if "dtype" in declared:
            return rest(convention.dtype)
        if not _runs_in_float64(module, config, convention, ids):
            return rest(torch.float32)
        coarse = rest(torch.float32)
        try:
            exact = rest(torch.float64)
        except SubjectError:  # a new module refuses it, such as one that makes a table in float32 at its first call
            return coarse
        better = len(coarse.missing) < len(exact.missing)  # buffers that are float32 for good, masks that overflow
        finite = [padded_is_finite(drawn(way.dtype), config, way, ids) for way in (coarse, exact)]
        narrower = "cache" not in exact.missing and is_narrower(drawn(torch.float64), config, exact, ids)
        if better or narrower:
            return coarse
        if finite != [True, False]:
            return exact
        # How padding is taken, it shows where it does not overflow.
        return replace(
            exact,
            padded_dtype=torch.float32,
            pads_left=coarse.pads_left,
            pads_left_untold=coarse.pads_left_untold,
            mask_covers_cache=coarse.mask_covers_cache,
        )


def _refuse_lost_buffers(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> None:
    """Where nothing but NaN comes out, the buffer that it comes from is all there is to say."""
    lost = [name for name, buffer in module.named_buffers() if bool(buffer.isnan().any())]
    if lost and bool(LM(module, config, convention).logits(ids).isnan().all()):
        raise SubjectError(
            f"the buffer {lost[0]} holds NaN as the module is built, and so do all logits: it was never filled, or "
            "lost its values, as by to_empty() after the meta device"
        )


def _find_call(module: nn.Module, declared: Mapping[str, Any]) -> Convention:
    """What the names of parameters and methods tell."""
    names: dict[str, Any] = {**parameter_names(module)}
    if names.get("labels") in LABELS_SHIFTED:
        names |= {"labels_come_shifted": True, "ignore_index": -1}
    if names.get("use_cache") == "return_intermediates":
        names |= {"cached_extra": {name: True for name in _AFTER if name in parameters(module)}}
        names |= {"new_tokens": _NEW_TOKENS}
    if (switch := names.get("loss_switch")) and parameters(module)[switch].default:
        names["extra"] = {switch: False}
    if "past" not in names and "new_cache" not in declared:
        names |= cache_on_module(module, names)
    required = required_parameters(module)
    if names.get("cache_on_module") and names.get("positions") in required:
        names["always_cached"] = True
    names["positions_always"] = names.get("positions") in required and not names.get("cache_on_module")
    convention = Convention(**{**names, **declared})
    known = {getattr(convention, role) for role in ROLES}
    others = [name for name in parameters(module) if name not in known]
    if unknown := [name for name in others if name in required]:
        raise SubjectError(
            f"forward needs {', '.join(unknown)}, which is none of the arguments that the harness knows: name a "
            "function config -> module instead, whose module gives it"
        )
    if hasattr(module, "generation_config"):  # transformers': a dozen, and all of them known
        return convention
    return replace(convention, passed_over=tuple(name for name in others if parameters(module)[name].default is None))


def _find_logits(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor, declared: Mapping[str, Any]
) -> Convention:
    """The first way to call it in which all positions' logits come, the last sees the first, and none sees the future.

    Where none is so, the first in which the last position sees the first; else the first.
    """
    ways = [convention] if "causal" in declared else _ways(convention, required_parameters(module))
    found, tried = _first_of(module, config, ways, ids)
    if found is None and (asking := logits_switches(module)):
        found, _ = _first_of(module, config, [replace(way, extra={**asking, **way.extra}) for way in ways], ids)
    if found is None and "always_cached" not in declared:  # gpt-fast: nothing goes without setup_caches
        cached = _either_first(_placed(always_cached_ways(module, convention)))
        found, further = _first_of(module, config, cached, ids)
        tried += further
        if found is None and convention.past and convention.new_cache is None:
            found, _ = _first_of(module, config, _either_first(_with_nothing(module, convention)), ids)
            found = found and _without_memory(module, config, found, ids)
    if found is None and convention.start and convention.cache_on_module:
        found, _ = _first_of(module, config, [replace(convention, always_cached=True, one_at_a_time=True)], ids)
    if found is None:
        always = [*([convention] if convention.always_cached else []), *always_cached_ways(module, convention)]
        ways = [replace(way, causal=None, one_row=True) for way in _placed(always)]
        found, _ = _first_of(module, config, ways, ids)
    if found is None:
        raise uncallable(module, config, tried)
    return found


def _with_nothing(module: nn.Module, convention: Convention) -> list[Convention]:
    """The ways to begin a cache: with None, where it has no default, and with a list of it, one a layer."""
    none = replace(convention, causal=None, always_cached=True)
    listed = replace(none, new_cache=two_none_a_layer if convention.past_values else one_none_a_layer)
    return [none, listed] if convention.past in required_parameters(module) else [listed]


def _without_memory(module: nn.Module, config: DIYConfig, way: Convention, ids: Tensor) -> Convention:
    """The way; where what comes back is of a kind that is not taken, with None in its place in every call.

    labml's compressive transformer hands back hidden states, which its caller has to compress.
    """
    lm = LM(module, config, way)
    try:
        lm.extend(ids[:, :1], lm.extend(ids)[1])
    except (AttributeError, TypeError):
        if way.new_cache is None and way.past is not None and way.past_values is None:
            return replace(way, past=None, always_cached=False, extra={**way.extra, way.past: None})
    except Exception:  # a stranger's forward may raise anything; the checks will show it
        pass
    return way


def _first_of(
    module: nn.Module, config: DIYConfig, ways: Sequence[Convention], ids: Tensor
) -> tuple[Convention | None, list[Tried]]:
    """The best of several ways, None if all fail; and those that failed, in order."""
    accepted: list[tuple[bool, Convention]] = []
    tried: list[Tried] = []
    for way in ways:
        for trial in _for_all_positions(way):
            if trial.last_only and not _gives_last_only(LM(module, config, way), ids):
                continue
            if (error := wrong_logits(LM(module, config, trial), ids)) is None:
                break
            tried.append(Tried(trial, error))
        else:
            continue
        lm = LM(module, config, trial)
        if trial.sequence_first and not _rows_are_apart(lm, ids):  # they are the tokens of (batch, seq)
            continue
        reaches = _reaches(lm, ids)
        if reaches and _is_causal(lm, ids):
            return trial, tried
        accepted.append((not reaches, trial))
    return min(accepted, key=lambda way: way[0])[1] if accepted else None, tried


def _for_all_positions(way: Convention) -> list[Convention]:
    """As it is, with labels where they bring all logits, and prefix by prefix."""
    with_labels = [replace(way, logits_need_labels=True)] if way.labels else []
    return [way, *with_labels, replace(way, last_only=True)]


def _gives_last_only(lm: LM, ids: Tensor) -> bool:
    try:
        return lm.logits(ids).shape[:2] == (len(ids), 1)
    except Exception:  # a stranger's forward may raise anything
        return False


def _ways(convention: Convention, required: set[str]) -> list[Convention]:
    """The ways to call it, the plainest first."""
    plain = replace(convention, causal=None)
    ways = [] if convention.causal in required else [plain]
    if plain.lengths in required:
        ways = [replace(plain, mask_always=True)]
    if plain.mask in required:
        ways = [replace(way, mask_always=True) for way in mask_kinds(plain)]
    name = convention.causal or (convention.mask if convention.mask in _PERHAPS_CAUSAL else None)
    if name is not None:
        without = replace(plain, mask=None) if name == convention.mask else plain
        if name in required and convention.cache_on_module:
            ways.insert(0, replace(without, block_mask=name, always_cached=True))
        ways += [replace(without, causal=name, causal_mask=kind) for kind in CAUSAL_MASKS]
    return _either_first(_placed(ways))


def _either_first(ways: Sequence[Convention]) -> list[Convention]:
    """The ways, with tensors (B, T, …) and then (T, B, …)."""
    return [replace(way, sequence_first=first) for first in (False, True) for way in ways]


def _placed(ways: Sequence[Convention]) -> list[Convention]:
    """The ways, with positions (B, T) and then (T,) where they must be given."""
    return [
        replace(way, positions_are_shared=shared)
        for way in ways
        for shared in ((False, True) if way.positions_always else (way.positions_are_shared,))
    ]


def _reaches(lm: LM, ids: Tensor) -> bool:
    """Whether the first token reaches the last logits."""
    first = ids.clone()
    first[:, 0] = (ids[:, 0] + 1) % lm.config.vocab_size
    return not torch.equal(lm.logits(first)[:, -1], lm.logits(ids)[:, -1])


def _rows_are_apart(lm: LM, ids: Tensor) -> bool:
    """Whether the first row reaches no other, as a first token does."""
    other = ids.clone()
    other[0] = (ids[0] + 1) % lm.config.vocab_size
    return close(lm.logits(other)[1:], lm.logits(ids)[1:])


def _is_causal(lm: LM, ids: Tensor) -> bool:
    """Whether the last token reaches no earlier logit."""
    last = ids.clone()
    last[:, -1] = (ids[:, -1] + 1) % lm.config.vocab_size
    logits = lm.logits(ids)
    return bool(logits.isfinite().all()) and close(lm.logits(last)[:, :-1], logits[:, :-1])


def _buffers_must_stay(drawn: Callable[[], nn.Module], config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether it answers in float32 with buffers in the types that they were built in, and not with converted ones."""
    module = drawn()
    types = {parameter.dtype for parameter in module.parameters()}
    if all(buffer.dtype in types for buffer in module.buffers() if buffer.is_floating_point()):
        return False

    def answers(stay: bool) -> bool:
        lm = LM(drawn(), config, replace(convention, buffers_stay=stay))
        lm.cast(torch.float32)
        return refusal(lm.logits, ids) is None

    return answers(True) and not answers(False)


def _runs_in_float64(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether it does not refuse float64; kernels and modules do so in ways of their own."""
    logits = LM(module, config, convention).logits(ids)
    try:
        lm = LM(module, config, replace(convention, dtype=torch.float64))
        lm.cast(torch.float64)
        exact = lm.logits(ids)
    except Exception:  # the report says which dtype was used
        return False
    return bool(exact.isfinite().all()) or not bool(logits.isfinite().all())


def _find_rest(
    module: nn.Module,
    config: DIYConfig,
    convention: Convention,
    ids: Tensor,
    declared: Mapping[str, Any],
    factory: Callable[..., Any] | None,
) -> Convention:
    """How short inputs, padding, labels and cache are handled; what is missing."""
    shortest = _find_shortest(module, config, convention, ids)
    if shortest > 1 and (step := only_multiples(LM(module, config, convention))) is not None:
        raise refuses_between(LM(module, config, convention), step)
    convention = replace(convention, shortest=shortest)
    convention = replace(convention, trains_on_cache=trains_on_cache(module, config, convention, ids))
    learns = _carries_gradient(module, config, convention, ids)
    convention = replace(convention, relative=_only_distances_count(LM(module, config, convention), ids))
    convention, no_padding = find_padding(module, config, convention, ids, declared)
    convention, no_loss = find_loss(module, config, convention, ids, declared)
    convention, no_cache = find_cache_and_rows(module, config, convention, ids, factory)
    if convention.installed:  # before, every call seemed to be on the cache
        learns = _carries_gradient(module, config, convention, ids)
    missing = no_padding | no_loss | no_cache | missing_packing(module, config, convention, ids)
    if (why := no_labelled_logits(module, config, convention, ids)) is not None:
        missing["labelled_logits"] = why
    if convention.always_cached and not learns:
        whose = "that the module keeps" if convention.cache_on_module else "that its caller makes"
        missing["gradient"] = missing["graph"] = f"every call is on the cache {whose}: it is for inference only"
    elif not learns:
        missing["graph"] = "its logits carry no gradient: see gradients.reach_every_parameter"
    return replace(convention, missing=missing)


def _only_distances_count(lm: LM, ids: Tensor) -> bool:
    """Whether positions matter between tokens, and a token alone is the same at any: rotary, or a bias of attention."""
    convention, alone = lm.convention, ids[:, :1]
    if not convention.positions or convention.positions_are_shared or convention.always_cached:
        return False
    if convention.shortest > 1 or refusal(lm.placed, alone, torch.full_like(alone, LENGTH - 1)) is not None:
        return False
    if not all(close(lm.placed(alone, torch.full_like(alone, at)), lm.logits(alone)) for at in range(1, LENGTH)):
        return False
    near = (torch.arange(LENGTH) // 2).expand_as(ids)
    return refusal(lm.placed, ids, near) is None and not close(lm.placed(ids, near), lm.logits(ids))


def _carries_gradient(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> bool:
    """Whether the logits do."""
    try:
        with torch.enable_grad():
            return LM(module, config, convention).logits(ids).requires_grad
    except SubjectError:
        raise
    except Exception as error:  # a stranger's forward may raise anything
        raise SubjectError(
            f"converted to {convention.dtype} the module fails: {said_where(error)}; .to(dtype) must leave it able to "
            "answer, with what it keeps or makes in a type of its own as well"
        ) from error


def _find_shortest(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> int:
    lm = LM(module, config, convention)
    return next((T for T in range(1, LENGTH) if refusal(lm.logits, ids[:, :T]) is None), LENGTH)
