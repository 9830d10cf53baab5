"""Where what generate writes parts from the likeliest tokens.

Shapes: B batch, T prompt length, N new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.calling.signature import told_parameters
from diymodel.verify.experiments.handing import Arguments, handed
from diymodel.verify.held import tensors_in
from diymodel.verify.symptoms import SAME, Patient, apart, symptom

PADDED = ("generation.padded_prompt",)
_CACHED = tuple(  # checks that generate fails as well where its calls lose their cache
    f"generation.{name}"
    for name in (
        *("greedy_is_argmax", "cached_greedy_is_argmax", "eos_per_row", "past_context", "padded_prompt"),
        *("follows_distribution", "temperature_zero", "top_k", "top_p", "ignores_training_mode"),
    )
)
_ROWS = 24
_PROMPT = 4
_NEW = 4
_NEAR = 1e-5  # of the largest logit: what generate may take for the likeliest, most choose in float32


class Prompts(NamedTuple):
    ids: Tensor  # (B, T)
    real: Tensor  # (B, T), False at padding
    new: int  # tokens that are asked for


def drawn_prompts(patient: Patient, lm: LM, padded: bool) -> Prompts:
    """Random prompts, so many that a wrong logit shows in a token; padded on the side on which they should be."""
    device = lm.device
    T = min(_PROMPT, lm.config.max_seq_len - 2)
    rows = 1 if lm.generating.one_row else _ROWS
    ids = torch.randint(lm.config.vocab_size, (rows, T), generator=torch.Generator().manual_seed(5)).to(device)
    shortest = max(1, lm.convention.shortest)
    lengths = (T - torch.arange(rows, device=device) % T).clamp(min=shortest)
    real = torch.arange(T, device=device) < (lengths[:, None] if padded else T)
    real = real.expand(rows, T)
    left = lm.generating.pads_left or "left_padding" in patient.subject.claims
    return Prompts(ids, real.flip(1) if left else real, min(_NEW, lm.config.max_seq_len - T))


def write(lm: LM, prompts: Prompts, padded: bool) -> Tensor:
    return lm.greedy(prompts.ids.clone(), prompts.new, prompts.real if padded else None)


@torch.no_grad()
def parts_at(lm: LM, prompts: Prompts, found: Tensor) -> int | None:
    """Which new token is first, of any row, not the likeliest after what its row holds alone; None: all are."""
    first = None
    for row, new in enumerate(lm.generating.new_tokens(found, prompts.real)):
        whole = torch.cat((prompts.ids[row][prompts.real[row]], new[: prompts.new]))
        if len(new) < prompts.new or bool((whole >= lm.config.vocab_size).any()):
            return 0
        logits = lm.logits(whole[None, :-1])[0, -prompts.new :]
        behind = logits.amax(-1) - logits.gather(-1, whole[-prompts.new :, None])[:, 0]
        wrong = (~(behind <= _NEAR * float(logits.abs().max()))).nonzero()
        if len(wrong):
            first = min(int(wrong[0]), prompts.new if first is None else first)
    return first


def setting(patient: Patient, lm: LM) -> bool | None:
    """Whether padding is what it takes to go wrong; None where nothing goes wrong."""
    if patient.subject.missing("greedy") is not None:
        return None
    for padded in (False, True):
        if padded and patient.subject.missing("generate_padded") is not None:
            break
        prompts = drawn_prompts(patient, lm, padded)
        if parts_at(lm, prompts, write(lm, prompts, padded)) is not None:
            return padded
    return None


@symptom(
    "generation.first_new_token_right",
    "after padding the first new token is right, and later ones are not",
    "有 padding 时第一个新 token 是对的，之后的才错",
    PADDED,
    ("padding-mask-lost-in-decode", "position-ids-ignored"),
)
def _first_new_token_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    if setting(patient, lm) is not True:
        return None
    prompts = drawn_prompts(patient, lm, padded=True)
    return parts_at(lm, prompts, write(lm, prompts, padded=True)) != 0


@symptom(
    "generation.reads_the_padding",
    "with other tokens at the padding of the prompts, other tokens are generated",
    "换掉提示词里 padding 位置上的 token，生成的结果就变了",
    PADDED,
    ("continues-from-pad", "padding-mask-lost-in-decode"),
)
def _reads_the_padding(patient: Patient) -> bool | None:
    lm = patient.lm()
    if setting(patient, lm) is not True:
        return None
    return _reads_its_padding(lm, drawn_prompts(patient, lm, padded=True))


@symptom(
    "generation.reads_padding_on_the_left",
    "with other tokens at padding in front of the prompts, other tokens are generated",
    "换掉提示词前面 padding 位置上的 token，生成的结果就变了",
    PADDED,
    ("padding-mask-ignored", "padding-mask-lost-in-decode"),
)
def _reads_padding_on_the_left(patient: Patient) -> bool | None:
    lm = patient.lm()
    if "mask" not in lm.generating.names or setting(patient, lm) is not True:
        return None
    prompts = drawn_prompts(patient, lm, padded=True)
    real = prompts.real.flip(1) if bool(prompts.real[:, 0].all()) else prompts.real
    return _reads_its_padding(lm, prompts._replace(real=real))


def _reads_its_padding(lm: LM, prompts: Prompts) -> bool:
    """Whether other tokens at the padding make generate write others."""
    other = prompts._replace(ids=prompts.ids.where(prompts.real, prompts.ids.roll(1, 0)))
    seen, plain = (lm.generating.new_tokens(write(lm, each, padded=True), each.real) for each in (other, prompts))
    return any(not one[: prompts.new].equal(two[: prompts.new]) for one, two in zip(seen, plain, strict=True))


@symptom(
    "generation.goes_on_after_the_padding",
    "the first new token is the likeliest after the padding, not after the prompt",
    "第一个新 token 接的是 padding 的末尾，而不是提示词的末尾",
    PADDED,
    ("continues-from-pad",),
    settles=("generation.padded_prompt",),
)
def _goes_on_after_the_padding(patient: Patient) -> bool | None:
    lm = patient.lm()
    prompts = drawn_prompts(patient, lm, padded=True)
    if not bool(prompts.real[:, 0].all()) or setting(patient, lm) is not True:
        return None
    found = lm.generating.new_tokens(write(lm, prompts, padded=True), prompts.real)
    firsts = torch.stack([new[0] for new in found])
    masks = (prompts.real,) if "mask" in lm.generating.names else (prompts.real, None)
    return any(firsts.equal(lm.logits(prompts.ids, real)[:, -1].argmax(-1)) for real in masks)


@symptom(
    "generation.goes_on_within_the_prompt",
    "behind padding the first new token is the likeliest after an earlier token of the prompt: the last one is looked "
    "for as many places too far to the left as there is padding",
    "左侧有 padding 时，第一个新 token 接的是提示词里更早的位置：padding 有几个，取的位置就偏左几个",
    PADDED,
    ("continues-from-pad",),
)
def _goes_on_within_the_prompt(patient: Patient) -> bool | None:
    lm = patient.lm()
    prompts = drawn_prompts(patient, lm, padded=True)
    if setting(patient, lm) is not True:
        return None
    found = lm.generating.new_tokens(write(lm, prompts, padded=True), prompts.real)
    answers = []
    for ids, real, new in zip(prompts.ids, prompts.real, found, strict=True):
        row = ids[real]
        padding = len(ids) - len(row)
        if 0 < padding < len(row):
            answers.append(bool(new[0] == lm.logits(row[None])[0, -1 - padding].argmax()))
    return all(answers) if answers else None


@symptom(
    "generation.right_by_hand",
    "fed by hand, the module is right on its cache: only the calls that generate makes go wrong",
    "手动逐个送入 token 时，带 cache 的结果是对的：只有 generate 里的调用出错",
    ("generation.cached_greedy_is_argmax",),
    ("position-restarts-in-decode", "cached-path-diverges"),
)
def _right_by_hand(patient: Patient) -> bool | None:
    lm = patient.lm()
    if patient.subject.missing("cache") is not None or setting(patient, lm) is not False:
        return None
    prompts = drawn_prompts(patient, lm, padded=False)
    logits, past = lm.extend(prompts.ids)
    tokens = prompts.ids
    for _ in range(prompts.new):
        if apart(logits[:, -1], lm.logits(tokens)[:, -1]) > SAME:
            return False
        new = logits[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, new), 1)
        logits, past = lm.extend(new, past)
    return True


@symptom(
    "generation.cache_is_swallowed",
    "generate hands forward a cache under a name that forward does not have",
    "generate 传给 forward 的 cache，用的是 forward 里没有的参数名",
    ("generation.*",),
    ("cache-argument-swallowed",),
    settles=_CACHED,
)
def _cache_is_swallowed(patient: Patient) -> bool | None:
    lm = patient.lm()
    swallowing = [name for name, p in told_parameters(lm.module.forward).items() if p.kind == p.VAR_KEYWORD]
    if not swallowing or patient.subject.missing("greedy") is not None:
        return None
    found: list[bool] = []

    def look(arguments: Arguments) -> None:
        given = arguments.get(swallowing[0], {}).values()
        found.extend(not isinstance(value, Tensor) and bool(tensors_in(value)) for value in given)

    with handed(lm, look):
        write(lm, drawn_prompts(patient, lm, padded=False), padded=False)
    return any(found)
