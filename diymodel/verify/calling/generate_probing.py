"""Finds how a stranger's module generates, by trying what the names of parameters tell.

Shapes: B batch, T prompt length, N new tokens, L length of what is returned, V vocabulary.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.entries import Entry, others
from diymodel.verify.calling.generate_names import NAMES, by_names, lacking
from diymodel.verify.calling.generating import CAPABILITIES, FEWER, FORMS, MANY, Generating
from diymodel.verify.convention import Convention
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.failure import crashed, refusal, said
from diymodel.verify.timing import OutOfTime, time_limit

_TOKENS = ("input_ids", "idx", "tokens", "token_ids", "prompt_ids")  # others may be text
_TOTALS = ("max_length", "max_len")  # of prompt and new tokens together, where trying leaves it open
_CALLS = 6  # in which a draw shows
_SECONDS = 30  # for all of a module's answers
_SURELY_GREEDY = {"do_sample": False, "top_k": 1, "temperature": 0.0}  # the last one may be divided by
_WARM = 0.8
_ONLY_DRAWS = {"seed", "top_p"}  # who has none of these, but one of those, always draws
_SWITCHED_OFF = (None, 0)  # what top_k may be where it excludes nothing
_CRASHES = (AttributeError, NameError, TypeError, LookupError)  # of a mistake, where others refuse
_MISFIT = re.compile(  # torch's, of shapes
    r"must match the (existing )?size|mat1 and mat2|invalid for input of size|prob_dist must be 1 or 2 dim"
)
_NO_CHOICE = re.compile("probability tensor contains")  # torch's, where nothing is left to draw among
_NO_NUMBER = re.compile("list|tuple|set|sequence|iterable|collection|tensor|str", re.IGNORECASE)  # in an annotation


def with_generating(
    build: Callable[[], nn.Module],
    config: DIYConfig,
    convention: Convention,
    factory: Callable[..., Any] | None = None,
) -> Convention:
    """The convention, completed by how a module that ``build`` makes of ``config`` generates.

    Where it has no ``generate``, the functions beside its class and beside ``factory`` are tried.
    """
    generating = convention.generating  # its author may have stated it
    if generating is None:
        module = LM(build(), config, convention).cast(convention.dtype)
        module.eval()
        try:
            with time_limit(_SECONDS):
                generating = find_generating(module, config, convention, factory)
        except OutOfTime:
            generating = _without_all(f"generate did not answer a few tiny calls in {_SECONDS} s")
        except Exception as error:  # a stranger's generate may raise anything, at any time
            generating = _without_all(f"generate failed on token ids: {said(error)}")
    return replace(convention, generating=generating, missing={**convention.missing, **generating.missing})


def find_generating(
    module: nn.Module, config: DIYConfig, convention: Convention, factory: Callable[..., Any] | None = None
) -> Generating:
    """Try how a freshly built module generates, in eval mode, and record how it wants to be called."""
    if convention.sequence_first:
        return _without_all("forward takes (seq, batch), and generate is tried with (batch, seq) only")
    draw_weights(module, seed=0, sharpness=2)  # as built, many a model repeats one token whatever it is given
    ids = (torch.arange(2 * 4) % config.vocab_size).view(2, 4)
    lm = LM(module, config, convention)
    generating = by_names(module, convention, Entry())
    if "new_tokens" in generating.names:
        return _settled(_in_form(_with(lm, generating), ids), ids)
    parameters = generating.entry.parameters(module)
    lacks = "is not a method of the module"
    if parameters:
        lacks = f"has no parameter for the number of new tokens: it has {', '.join(parameters)}"
    failed, unknown = [], []
    for entry in others(module, factory):
        other = _with(lm, by_names(module, convention, entry))
        if (lacks_it := lacking(other.generating, entry.parameters(module))) is not None:
            unknown.append(f", and {entry} {lacks_it}")
            continue
        other = _in_form(other, ids)
        if (why := _refused_alone(other, ids)) is None:
            return _settled(other, ids)
        failed.append(f", and {entry} failed on token ids: {why}")
    return _without_all(f"generate {lacks}{''.join([*failed, *unknown][:1])}")


def _with(lm: LM, generating: Generating) -> LM:
    return LM(lm.module, lm.config, replace(lm.convention, generating=generating))


def _refused_alone(lm: LM, ids: Tensor) -> str | None:
    """What it says against two rows and against one alike."""
    return _refused(lm, ids, {}) and _refused(lm, ids[1:], {})


def _in_form(lm: LM, ids: Tensor) -> LM:
    """With prompts in the first form that is taken; in the usual one, where none is.

    Each is tried with top_k switched off as well: a default that is more than there are tokens would have all refused.
    """
    ways = (_with(way, replace(way.generating, form=form)) for way in (lm, *_top_k_off(lm)) for form in FORMS)
    return next((way for way in ways if _refused_alone(way, ids) is None), lm)


def _settled(lm: LM, ids: Tensor) -> Generating:
    """All that trying says of an entry that takes token ids and a number of new ones."""
    lm = next((way for way in _top_k_off(lm) if _refused(way, ids[1:], {}) is None), lm)
    generating, missing = lm.generating, {}
    if (why := _refused(lm, ids, {})) is not None:
        missing["generate_batch"] = f"generate does not take two rows: {why}"
        ids = ids[1:]
    try:
        lm.generate(ids, 2)
        found = replace(_find_counting(lm, ids), one_row=len(ids) == 1)
        for find in (_find_greedy, _find_sampling, _find_settings, _find_padding):
            found, without = find(_with(lm, found), ids)
            missing |= without
    except Exception as error:  # of a call without settings, or with some that went through before
        if generating.names["ids"] in _TOKENS and crashed(error):
            return _crashing(generating, f"generate failed on token ids: {said(error)}")
        raise
    return replace(found, missing={**missing, **found.missing})


def _crashing(generating: Generating, why: str) -> Generating:
    """That of an entry whose plain calls run into a mistake: the checks that need no more will show it.

    Shorter calls may well go through, and must not draw then.
    """
    greedy = next(({role: value} for role, value in _SURELY_GREEDY.items() if role in generating.names), {})
    shown = ("generate", "greedy") if greedy or not _ONLY_DRAWS & generating.names.keys() else ("generate",)
    return replace(generating, greedy=greedy, missing={c: why for c in CAPABILITIES if c not in shown})


def _narrows(top_k: inspect.Parameter | None) -> bool:
    """Whether it must be given, or is a number of tokens to draw among by default; 1 is its author's greedy choice."""
    if top_k is None:
        return False
    return top_k.default is top_k.empty or (isinstance(top_k.default, int) and top_k.default > 1)


def _top_k_off(lm: LM) -> list[LM]:
    """With top_k switched off, in either way, where its default narrows every draw."""
    generating = lm.generating
    name = generating.names.get("top_k", "")
    if not _narrows(generating.entry.parameters(lm.module).get(name)):
        return []
    return [_with(lm, replace(generating, fixed={**generating.fixed, name: off})) for off in _SWITCHED_OFF]


def _find_counting(lm: LM, ids: Tensor) -> Generating:
    """Whether the prompt is in what is asked for, and in what is returned."""
    T, new_tokens = ids.shape[1], 6
    found = lm.generate(ids, new_tokens)
    prompt_first = torch.equal(found[:, :T], ids)
    if lm.generating.counts_prompt:
        return replace(lm.generating, returns_prompt=prompt_first)
    name = lm.generating.names["new_tokens"]
    counts, returns = {
        T + new_tokens: (False, True),
        new_tokens - T: (True, False),
        new_tokens: (prompt_first, prompt_first),
    }.get(found.shape[1], (name in _TOTALS, prompt_first))
    counts &= "new" not in name.lower()  # else it promises what it does not hold
    return replace(lm.generating, counts_prompt=counts, returns_prompt=returns)


def _find_greedy(lm: LM, ids: Tensor) -> tuple[Generating, dict[str, str]]:
    generating = lm.generating
    settings = {"do_sample": False, "temperature": 0.0, "top_k": 1}
    candidates = [{role: value} for role, value in settings.items() if role in generating.names]
    taken, refusals = [], []
    for greedy in candidates:
        if (refused := _refused(lm, ids, greedy)) is None:
            taken.append(greedy)
            continue
        ((role, value),) = greedy.items()
        refusals.append(f"{generating.names[role]}={value}: {refused}")
    if taken:
        return replace(generating, greedy=_greediest(lm, ids, taken)), {}
    if not candidates and not _draws(lm, ids, {}):
        return generating, {}
    why = "generate has no do_sample, no temperature that may be 0 and no top_k to be greedy by"
    return generating, {"greedy": f"{why}; {'; '.join(refusals)}" if refusals else why}


def _greediest(lm: LM, ids: Tensor, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the settings that draws nothing; without one, the first that gives the same each time, or of all.

    A temperature of 0 that draws is the matter of a check of its own. No other asks whether ``do_sample=False`` does.
    """
    if len(taken) == 1 or "do_sample" in taken[0]:
        return taken[0]
    return min(taken, key=lambda greedy: _chances(lm, ids, greedy))


def _find_sampling(lm: LM, ids: Tensor) -> tuple[Generating, dict[str, str]]:
    settings = {"do_sample": True, "temperature": 1.0}
    sampling = {role: value for role, value in settings.items() if role in lm.generating.names}
    generating = replace(lm.generating, sampling=sampling)
    if any(_crashes(lm, ids, role, sampling) for role in sampling):
        return generating, {}
    for rows in (MANY, *FEWER):
        if (why := _refused(lm, ids[:1].repeat(rows, 1), sampling)) is None:
            break
    else:
        return generating, {"sampling": f"generate does not draw in {rows} rows at once: {why}"}
    generating = replace(generating, most_rows=rows)
    if "seed" not in generating.names and not any(_draws(lm, ids, way) for way in _hotter(sampling)):
        return lm.generating, {"sampling": "generate has no seed, and draws nothing from torch's random generator"}
    return generating, {}


def _hotter(sampling: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings, and with another temperature than 1: one at which nothing is drawn may be taken for greedy."""
    return [sampling, *([{**sampling, "temperature": _WARM}] if "temperature" in sampling else [])]


def _find_settings(lm: LM, ids: Tensor) -> tuple[Generating, dict[str, str]]:
    """Which settings there are. One that crashes is there: the check that sets it will say so."""
    generating, missing = lm.generating, {}
    greedy, sampling = generating.greedy, generating.sampling
    tried: dict[str, tuple[str, Mapping[str, Any]]] = {  # capability -> the role it is of, and settings
        "generate_cache": ("use_cache", {**greedy, "use_cache": True}),
        "temperature_zero": ("temperature", {**sampling, "temperature": 0.0}),
        "top_k": ("top_k", {**sampling, "top_k": 2}),
        "top_p": ("top_p", {**sampling, "top_p": 1.0}),
        "repetition_penalty": ("repetition_penalty", {**greedy, "repetition_penalty": 2.0}),
        "eos": ("eos", {**greedy, "eos": 3}),
    }
    for capability, (role, settings) in tried.items():
        name = generating.names.get(role)
        if name is None:
            missing[capability] = f"generate has no {NAMES[role][0]}"
        elif (why := _refused(lm, ids, settings)) is not None and not _crashes(lm, ids, role, settings):
            missing[capability] = f"generate does not take {name}={settings[role]}: {why}"
    return generating, missing


def _refused(lm: LM, ids: Tensor, settings: Mapping[str, Any]) -> str | None:
    return refusal(lambda: lm.generate(ids, 2, **settings))


def _crashes(lm: LM, ids: Tensor, role: str, settings: Mapping[str, Any]) -> bool:
    """Whether generate names a setting, gets a value of the kind it asks for, and fails by a mistake of its own."""
    generating = lm.generating
    parameter = generating.entry.parameters(lm.module).get(generating.names[role])
    if parameter is None or not _is_of_kind(settings[role], parameter):
        return False
    try:
        lm.generate(ids, 2, **settings)
    except _CRASHES:
        return True
    except Exception as error:  # a refusal, unless tensors did not fit
        mistakes = (_MISFIT, _NO_CHOICE) if role == "top_k" else (_MISFIT,)  # temperature=0 may well leave none
        return isinstance(error, RuntimeError) and any(mistake.search(str(error)) for mistake in mistakes)
    return False


def _is_of_kind(value: float, parameter: inspect.Parameter) -> bool:
    """Whether a number or a switch is what the annotation and the default ask for."""
    default, annotation = parameter.default, parameter.annotation
    if not (default is None or default is parameter.empty or isinstance(default, (int, float))):
        return False
    return annotation is parameter.empty or not _NO_NUMBER.search(inspect.formatannotation(annotation))


def _draws(lm: LM, ids: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether a call draws from torch's global generator, or gives another result each time."""
    return any(_chances(lm, ids, settings))


def _chances(lm: LM, ids: Tensor, settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether calls give different results, and whether they draw from torch's global generator."""
    before = torch.get_rng_state()
    first, *others = [lm.generate(ids, 4, **settings) for _ in range(_CALLS)]
    differ = any(not torch.equal(other, first) for other in others)
    return differ, not torch.equal(torch.get_rng_state(), before)


def _find_padding(lm: LM, ids: Tensor) -> tuple[Generating, dict[str, str]]:
    """On which side short prompts are padded, and where the new tokens of a row padded on the right stand."""
    generating = lm.generating
    right = torch.tensor([[True] * 4, [True, True, False, False]])
    if not {"mask", "lengths"} & generating.names.keys():
        ragged = replace(generating, ragged=True)
        if generating.one_row or refusal(_with(lm, ragged).greedy, ids, 4, right) is not None:
            return generating, {"generate_padded": "generate has no attention_mask and no seq_lengths"}
        return replace(ragged, follows_padding=_follows_padding(_with(lm, ragged), ids, right)), {}
    if generating.one_row:
        return generating, {"generate_padded": "generate takes one row at a time"}
    sides = {"right": right} if "lengths" in generating.names else {"right": right, "left": right.flip(1)}
    if hasattr(lm.module, "generation_config"):  # transformers' own pads on the left
        sides = dict(reversed(sides.items()))
    if (dtype := lm.convention.padded_dtype) is not None:
        lm.cast(dtype)
    refusals = {side: refusal(lm.greedy, ids, 4, real) for side, real in sides.items()}
    if refusals["right"] is None:
        generating = replace(generating, follows_padding=_follows_padding(lm, ids, right))
    taken = [side for side, why in refusals.items() if why is None]
    if not taken:
        (side, why), *_ = refusals.items()
        return generating, {"generate_padded": f"generate does not take padding on the {side}: {why}"}
    # Where neither side works, it is the first that should.
    lm = _with(lm, generating)
    side = next((side for side in taken if _continues_as_alone(lm, ids, sides[side])), taken[0])
    return replace(generating, pads_left=side == "left"), {}


def _follows_padding(lm: LM, ids: Tensor, right: Tensor) -> bool:
    """Whether what fills the padding of a row stays in its place."""
    T = ids.shape[1]
    for fill in (0, 1):
        settings = {"pad": fill} if "pad" in lm.generating.names else {}
        found = lm.greedy(ids.masked_fill(~right, fill), 2, right, **settings)
        if bool((found[:, :T][~right] != fill).any()):
            return False
    return True


def _continues_as_alone(lm: LM, ids: Tensor, real: Tensor) -> bool:
    """Whether every new token is the likeliest after the row's own, on the logits of the row alone."""
    for row, own, new in zip(ids, real, lm.generating.new_tokens(lm.greedy(ids, 4, real), real), strict=True):
        alone = torch.cat((row[own], new[:4]))
        likeliest = lm.logits(alone[None, :-1])[0].argmax(-1)
        if not torch.equal(likeliest[-4:], alone[-4:]):
            return False
    return True


def _without_all(why: str) -> Generating:
    return Generating(missing=dict.fromkeys(CAPABILITIES, why))
