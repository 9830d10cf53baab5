"""What generate hands back, and what it leaves of what it was given.

Shapes: B batch, T prompt length, N new tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import refusal
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_NEW = 3
_PROMPT = 3
_ROWS = 16
_GENERATION = ("generation.*",)
_ENDS = ("generation.eos_per_row",)


def _lengths(lm: LM) -> list[tuple[int, int]]:
    """Of prompts and of what is asked for; the last ones fill all that the model holds, if generate takes them."""
    longest = lm.config.max_seq_len
    full = ((_PROMPT, longest - _PROMPT), (longest - 1, 1))
    return [(_PROMPT, _NEW), *((T, N) for T, N in full if refusal(lm.generate, _prompt(lm, T), N) is None)]


def _prompt(lm: LM, length: int) -> Tensor:
    """Rows that hold every token between them, as few as generate takes (B, T)."""
    vocab_size = lm.config.vocab_size
    rows = torch.arange(1 if lm.generating.one_row else vocab_size)[:, None]
    return ((rows + torch.arange(length)) % vocab_size).to(lm.device)


@symptom(
    "generation.length_is_wrong",
    "generate returns another number of tokens than was asked for",
    "generate 返回的 token 数与要求的不同",
    _GENERATION,
    ("generated-length-wrong", "prompt-not-kept"),
)
def _length_is_wrong(patient: Patient) -> bool | None:
    lm = patient.lm()
    return any(lm.generate(_prompt(lm, T), N).shape[1] != T + N for T, N in _lengths(lm))


@symptom(
    "generation.begins_otherwise",
    "what generate returns does not begin with the prompt",
    "generate 返回的内容不是以提示词开头",
    _GENERATION,
    ("prompt-not-kept",),
)
def _begins_otherwise(patient: Patient) -> bool | None:
    lm = patient.lm()
    for T, N in _lengths(lm):
        ids = _prompt(lm, T)
        if not lm.generate(ids.clone(), N)[:, :T].equal(ids):
            return True
    return False


@symptom(
    "generation.writes_the_prompt",
    "the tensor of the prompt holds other tokens after generating",
    "生成之后，传入的提示词张量里的 token 变了",
    _GENERATION,
    ("inputs-written-in-place",),
)
def _writes_the_prompt(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _prompt(lm, _PROMPT)
    before = ids.clone()
    lm.generate(ids, _NEW)
    return not ids.equal(before)


@symptom(
    "generation.outside_the_vocabulary",
    "tokens come out that the vocabulary does not have",
    "生成了词表里不存在的 token",
    _GENERATION,
    ("padded-vocabulary-sampled",),
)
def _outside_the_vocabulary(patient: Patient) -> bool | None:
    lm = patient.lm(vocab_size=11)  # what is rounded up, to a multiple of whatever, is more than this
    return bool((lm.generate(_prompt(lm, _PROMPT), lm.config.max_seq_len - _PROMPT) >= lm.config.vocab_size).any())


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _drawn(lm: LM, seed: int, elsewhere: int = 0, **settings: float) -> Tensor:
    """New tokens (B, N) of equal rows, while torch's own random state is another one each time."""
    ids = distinct_tokens(lm, length=2).repeat(1 if lm.generating.one_row else _ROWS, 1)
    torch.manual_seed(elsewhere)
    return lm.sample(ids, min(_NEW, lm.config.max_seq_len - 2), seed, **settings)[:, 2:]


def _sampler(patient: Patient) -> LM | None:
    """A model whose draws are not all but certain."""
    return None if patient.subject.missing("sampling") is not None else patient.lm(sharpness=1)


@symptom(
    "generation.rows_share_their_draw",
    "equal rows draw the same first token, whatever the seed",
    "无论种子是什么，相同的各行第一个 token 总是抽到同一个",
    _GENERATION,
    ("samples-share-first-token",),
)
def _rows_share_their_draw(patient: Patient) -> bool | None:
    lm = _sampler(patient)
    if lm is None or lm.generating.one_row:
        return None
    firsts = [_drawn(lm, seed, seed)[:, 0] for seed in range(4)]
    return all(bool((first == first[0]).all()) for first in firsts)


@symptom(
    "generation.seed_does_not_decide",
    "with one seed other tokens are drawn where torch's own random state is another, or every seed draws the same",
    "种子相同，torch 的全局随机状态不同，抽到的 token 就不同；或者换了种子也总抽到同样的 token",
    ("generation.seed_repeats", "generation.random_state_untouched"),
    ("seed-ignored",),
)
def _seed_does_not_decide(patient: Patient) -> bool | None:
    lm = _sampler(patient)
    if lm is None or "seed" not in lm.generating.names:
        return None
    first = _drawn(lm, 0)
    return not _drawn(lm, 0, elsewhere=1).equal(first) or all(_drawn(lm, seed).equal(first) for seed in range(1, 5))


@symptom(
    "generation.draws_at_zero",
    "at temperature 0 other seeds give other tokens: it still draws",
    "温度为 0 时换个种子结果就不同：它还在抽样",
    ("generation.*",),
    ("temperature-zero",),
)
def _draws_at_zero(patient: Patient) -> bool | None:
    lm = _sampler(patient)
    if lm is None or patient.subject.missing("temperature_zero") is not None:
        return None
    first = _drawn(lm, 0, temperature=0.0)
    return any(not _drawn(lm, seed, seed, temperature=0.0).equal(first) for seed in range(1, 4))


def _with_an_end(patient: Patient) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Tokens (B, N) that are generated without an end token and with one, the row that it ends, and its step there.

    At that step no other row ends, nor has one before.
    """
    lm = patient.lm()
    rows = 1 if lm.generating.one_row else _ROWS
    ids = distinct_tokens(lm, rows, _PROMPT)
    new = min(lm.config.max_seq_len - _PROMPT, 2 * _NEW)
    plain = lm.greedy(ids, new)[:, _PROMPT:]
    for row, step in itertools.product(range(rows), range(new - 1)):
        eos = int(plain[row, step])
        if int((plain[:, : step + 1] == eos).sum()) > 1:
            continue
        settings: dict[str, Any] = {"eos": eos, "pad": (eos + 1) % lm.config.vocab_size}
        known = {role: value for role, value in settings.items() if role in lm.generating.names}
        yield plain, lm.greedy(ids, new, **known)[:, _PROMPT:], row, step


@symptom(
    "generation.ends_with_another_row",
    "where one row of a batch ends, the others end as well",
    "batch 里有一行结束，其他行也跟着结束",
    _ENDS,
    ("eos-not-per-row",),
)
def _ends_with_another_row(patient: Patient) -> bool | None:
    for plain, ended, row, step in _with_an_end(patient):
        others = [other for other in range(len(plain)) if other != row]
        if others:
            stopped = ended.shape[1] <= step + 1  # the end token itself may be left out
            return stopped or not bool((ended[others, step + 1] == plain[others, step + 1]).any())
    return None


@symptom(
    "generation.goes_on_after_its_end",
    "a row goes on after its own end token, with what it would have got without one",
    "一行生成了自己的结束 token 之后还在继续，得到的和没有结束 token 时一样",
    _ENDS,
    ("eos-not-per-row",),
)
def _goes_on_after_its_end(patient: Patient) -> bool | None:
    seen = [
        ended.shape[1] == plain.shape[1] and ended[row, step + 1 :].equal(plain[row, step + 1 :])
        for plain, ended, row, step in _with_an_end(patient)
        if len(set(plain[row, step + 1 :].tolist())) > 1
    ]
    return all(seen) if seen else None
