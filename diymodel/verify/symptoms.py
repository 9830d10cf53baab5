"""Symptoms: small experiments on a module that failed, which tell one bug from another that fails the same checks.

Each asks one question of the module as it is, without its code: which tokens a logit depends on, which formula a loss
is, whether a failing trial passes once an operation is repaired. The answers are facts for the diagnosis.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diymodel.config import DIYConfig
from diymodel.verify.adapters import IGNORED, LM
from diymodel.verify.failure import CheckFailure
from diymodel.verify.randomness import seeded
from diymodel.verify.repairs import CausalAttention, NoDropout, PositionsAfterTheCache, RepairOf, SoftmaxOverKeys
from diymodel.verify.report import Result
from diymodel.verify.subject import Subject
from diymodel.verify.timing import time_limit
from diymodel.verify.trial import Trial

_LENGTH = 6
_SAME = 1e-9  # of the largest logit: what is nearer is the same
_SECONDS = 20  # for one symptom
_WIDE = {  # no unit is so alone that a norm hides what it says
    "vocab_size": 16,
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 8,
    "max_seq_len": 16,
    "dropout": 0.0,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


class Patient:
    """A subject that failed, with what its failures showed."""

    def __init__(self, subject: Subject, failed: Mapping[str, Result]) -> None:
        self.subject = subject
        self.failed = failed

    def lm(self, sharpness: int = 2, **fixed: Any) -> LM:
        """A module with one layer and sharp weights; of a failing configuration where the subject refuses others."""
        first = next(result.failure.config for result in self.failed.values() if result.failure is not None)
        trial = Trial(self.subject, None)
        for config in ({**_WIDE, "num_layers": 1, **fixed}, {**first, "dropout": 0.0, **fixed}):
            try:
                return trial.build(DIYConfig.from_dict(config), seed=1, sharpness=sharpness)
            except Exception as error:  # a stranger's constructor may raise anything
                refusal = error
        raise refusal

    def passes_under(self, repair: RepairOf, ids: Iterable[str]) -> bool | None:
        """Whether the failing trials of these checks pass under a repair."""
        known = [result for id, result in self.failed.items() if id in ids and result.failure is not None]
        for result in known:
            assert result.failure is not None
            trial = Trial(self.subject, None, result.failure.values)
            trial.around = repair
            try:
                with seeded():
                    result.check.function(trial)
            except CheckFailure:
                return False
        return True if known else None


@dataclass(frozen=True)
class Symptom:
    """One question, and which bugs a yes speaks for."""

    id: str
    yes: str  # what a yes means, as evidence
    yes_zh: str
    when: tuple[str, ...]  # globs: asked where one of these checks failed
    causes: tuple[str, ...]  # slugs that a yes points to
    ask: Callable[[Patient], bool | None]


SYMPTOMS: dict[str, Symptom] = {}


def symptom(
    id: str, yes: str, yes_zh: str, when: Iterable[str], causes: Iterable[str]
) -> Callable[[Callable[[Patient], bool | None]], Callable[[Patient], bool | None]]:
    """Register the decorated question."""

    def register(ask: Callable[[Patient], bool | None]) -> Callable[[Patient], bool | None]:
        SYMPTOMS[id] = Symptom(id, yes, yes_zh, tuple(when), tuple(causes), ask)
        return ask

    return register


def observe(subject: Subject, results: Iterable[Result]) -> dict[str, bool]:
    """The answers to the questions that the failures raise, by id; those that the module cannot answer are left out."""
    failed = {result.check.id: result for result in results if result.status == "failed"}
    answers: dict[str, bool] = {}
    if not any(result.failure is not None for result in failed.values()):
        return answers
    patient = Patient(subject, failed)
    for found in SYMPTOMS.values():
        if not any(fnmatch.fnmatchcase(id, glob) for id in failed for glob in found.when):
            continue
        try:
            with seeded(), time_limit(_SECONDS):
                answer = found.ask(patient)
        except Exception:  # the module is broken: that it raises here says nothing more
            continue
        if answer is not None:
            answers[found.id] = answer
    return answers


# --- which tokens a logit depends on ---------------------------------------------------------------------------------

_LEAKS = ("causality.*",)


def _ids(lm: LM, rows: int = 1, length: int = _LENGTH) -> Tensor:
    """Distinct tokens in each row (B, T)."""
    generator = torch.Generator().manual_seed(3)
    rows_of = [torch.randperm(lm.config.vocab_size, generator=generator)[:length] for _ in range(rows)]
    return torch.stack(rows_of)


def _changed(ids: Tensor, position: int, row: int = 0) -> Tensor:
    """The tokens with another one at a position."""
    other = ids.clone()
    other[row, position] = (ids[row, position] + 7) % 16 if int(ids.max()) > 8 else 1 - ids[row, position].clamp(max=1)
    return other


def _apart(seen: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    scale = float(other.detach().abs().max())
    return float((seen - other).detach().abs().max()) / scale if scale else 0.0


def _influence(logits: Callable[[Tensor], Tensor], ids: Tensor) -> list[float]:
    """How far changing each token moves what ``logits`` gives."""
    plain = logits(ids)
    return [_apart(logits(_changed(ids, position)), plain) for position in range(ids.shape[1])]


def _leaks(lm: LM, ids: Tensor) -> list[list[float]]:
    """For each position, how far each later token moves its logits."""
    return [
        _influence(lambda tokens, t=t: lm.logits(tokens)[:, t], ids)[t + 1 :]  # type: ignore[misc]
        for t in range(ids.shape[1] - 1)
    ]


@symptom(
    "leak.next_token_only",
    "in one layer a position sees the token after it, and none further",
    "单层时，每个位置只能看到它后面的那一个 token",
    _LEAKS,
    ("mask-sees-next-token",),
)
def _next_token_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    leaks = _leaks(lm, _ids(lm))
    beyond = max((leak for row in leaks for leak in row[1:]), default=0.0)
    nearest = max(row[0] for row in leaks)
    return None if nearest <= _SAME and beyond <= _SAME else beyond <= _SAME


@symptom(
    "leak.of_all_tokens",
    "in one layer a position sees all tokens after it",
    "单层时，每个位置能看到后面的所有 token",
    _LEAKS,
    ("bidirectional-mask", "mask-dropped-on-fast-path", "softmax-wrong-axis", "statistic-over-sequence"),
)
def _all_tokens(patient: Patient) -> bool | None:
    lm = patient.lm()
    return all(leak > _SAME for row in _leaks(lm, _ids(lm)) for leak in row)


@symptom(
    "leak.faint",
    "what a position sees of the future is a hundredth of what it sees of its past",
    "看到的未来只有看到的过去的百分之一",
    _LEAKS,
    ("mask-value-too-small",),
)
def _faint(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    ids = _ids(lm)
    future = max(leak for row in _leaks(lm, ids) for leak in row)
    past = _influence(lambda tokens: lm.logits(tokens)[:, -1], ids)[:-1]
    return None if future <= _SAME else future < 0.01 * max(past)


@symptom(
    "leak.blind_to_order",
    "exchanging two later tokens changes nothing, though changing one does: something is averaged over the sequence",
    "交换后面两个 token 没有影响，改掉其中一个却有：有东西对整个序列做了平均",
    _LEAKS,
    ("statistic-over-sequence",),
)
def _blind_to_order(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm)
    exchanged = ids.clone()
    exchanged[:, -2:] = ids[:, -2:].flip(1)
    plain = lm.logits(ids)[:, 0]
    if _apart(lm.logits(_changed(ids, -1))[:, 0], plain) <= _SAME:
        return None
    return _apart(lm.logits(exchanged)[:, 0], plain) <= _SAME


@symptom(
    "leak.on_some_paths",
    "it leaks on some paths and not on others: with and without gradients, under one attention kernel or another",
    "有的路径泄漏，有的不泄漏：开关梯度、换 attention kernel，结果不同",
    ("causality.*", "training.*"),
    ("mask-dropped-on-fast-path", "attention-backends-disagree"),
)
def _on_some_paths(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm)
    found = set()
    for path in (torch.enable_grad, torch.no_grad, partial(sdpa_kernel, SDPBackend.MATH)):
        with path():
            found.add(_influence(lambda tokens: lm.logits(tokens)[:, 0], ids)[1] > _SAME)
    return len(found) > 1


@symptom(
    "leak.with_dropout_only",
    "without dropout nothing leaks",
    "没有 dropout 时不泄漏",
    ("causality.in_training",),
    ("mask-dropped-with-dropout",),
)
def _with_dropout_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    lm.module.train()
    return max(leak for row in _leaks(lm, _ids(lm)) for leak in row) <= _SAME


@symptom(
    "repair.causal_attention",
    "with an exactly causal mask put into attention, the failing trial passes",
    "把 attention 的掩码换成严格的因果掩码后，失败的例子就通过了",
    ("causality.*", "decode.chunks", "decode.cached_equals_full"),
    (
        "bidirectional-mask",
        "mask-sees-next-token",
        "mask-dropped-on-fast-path",
        "mask-value-too-small",
        "chunk-unmasked",
    ),
)
def _causal_attention(patient: Patient) -> bool | None:
    checks = ("causality.edit", "causality.truncation", "causality.in_training", "decode.chunks")
    return patient.passes_under(CausalAttention, checks)


@symptom(
    "repair.softmax_over_keys",
    "with the softmax taken over the keys, the failing trial passes",
    "把 softmax 改到 key 那一维上后，失败的例子就通过了",
    ("causality.edit", "causality.truncation"),
    ("softmax-wrong-axis",),
)
def _softmax_over_keys(patient: Patient) -> bool | None:
    return patient.passes_under(SoftmaxOverKeys, ("causality.edit", "causality.truncation"))


@symptom(
    "repair.no_dropout",
    "without dropout the failing trials pass",
    "关掉 dropout 后，失败的例子就通过了",
    ("batch.*", "causality.*", "forward.*", "loss.*", "decode.*", "modes.*"),
    ("dropout-active-in-eval",),
)
def _no_dropout(patient: Patient) -> bool | None:
    checks = ("forward.deterministic", "causality.edit", "decode.cached_equals_full", "modes.dropout_off_in_eval")
    return patient.passes_under(NoDropout, checks)


@symptom(
    "gradients.module_not_called",
    "a module that has parameters is never called",
    "有参数的模块从来没有被调用",
    ("gradients.*", "causality.gradient"),
    ("module-never-called",),
)
def _module_not_called(patient: Patient) -> bool | None:
    lm = patient.lm(num_layers=2)
    called: set[str] = set()
    for name, module in lm.module.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    lm.logits(_ids(lm)).sum().backward()  # type: ignore[no-untyped-call]
    parts = lm.module.named_modules()
    silent = {name for name, part in parts if any(p.grad is None for p in part.parameters(recurse=False))}
    return bool(silent - called)


@symptom(
    "shift.faint",
    "moving all positions changes little, as rounding in a half type does",
    "整体平移位置只引起很小的变化，像半精度的舍入",
    ("sensitivity.shift_invariance",),
    ("rope-low-precision",),
)
def _shift_faint(patient: Patient) -> bool | None:
    failure = patient.failed["sensitivity.shift_invariance"].failure
    return None if failure is None or failure.max_abs_diff is None else failure.max_abs_diff < 1e-2


# --- what a cached step sees -----------------------------------------------------------------------------------------

_DECODE = ("decode.*", "generation.cached_*", "directory.cached_*", "padding.*_with_cache")
_PREFILL = _LENGTH - 1


def _cached_last(lm: LM, prefill: int = _PREFILL, step: int | None = None) -> Callable[[Tensor], Tensor]:
    """The logits of the last token, fed ``step`` tokens at a time (None: all at once) after a prefill."""

    def run(ids: Tensor) -> Tensor:
        logits, past = lm.extend(ids[:, :prefill])
        for part in torch.split(ids[:, prefill:], step or ids.shape[1], 1):
            logits, past = lm.extend(part, past)
        return logits[:, -1]

    return run


def _wrong(lm: LM, ids: Tensor, prefill: int, step: int | None = None) -> bool:
    """Whether the last token's logits are wrong so fed."""
    return _apart(_cached_last(lm, prefill, step)(ids), lm.logits(ids)[:, -1]) > _SAME


@symptom(
    "decode.ignores_the_prefix",
    "what was cached changes nothing: a cached step sees its own token only",
    "缓存的内容毫无作用：解码一步只看到它自己的 token",
    _DECODE,
    ("cache-object-replaced",),
)
def _ignores_the_prefix(patient: Patient) -> bool | None:
    lm = patient.lm()
    return max(_influence(_cached_last(lm), _ids(lm))[:-1]) <= _SAME


@symptom(
    "decode.forgets_the_oldest",
    "a cached step no longer sees the oldest tokens, and the whole sequence does",
    "用 cache 解码时看不到最早的 token，整段计算时却看得到",
    _DECODE,
    ("cache-drops-oldest", "ring-cache-overwritten", "position-from-kept-length"),
)
def _forgets_the_oldest(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm, length=8)
    cached = _influence(_cached_last(lm, 1, 1), ids)[:-1]
    whole = _influence(lambda tokens: lm.logits(tokens)[:, -1], ids)[:-1]
    return cached[0] <= _SAME < whole[0] and cached[-1] > _SAME


@symptom(
    "decode.sees_more",
    "a cached step sees tokens that the whole sequence does not",
    "用 cache 解码时看到了整段计算时看不到的 token",
    _DECODE,
    ("window-ignored-in-decode",),
)
def _sees_more(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm, length=8)
    cached = _influence(_cached_last(lm, 7), ids)
    whole = _influence(lambda tokens: lm.logits(tokens)[:, -1], ids)
    return any(seen > _SAME >= hidden for seen, hidden in zip(cached, whole, strict=True))


@symptom(
    "decode.right_in_one_row",
    "one row alone is continued rightly, several are not",
    "只有一行时正确，多行时出错",
    _DECODE,
    ("cache-rows-shared", "beam-reorder-skipped", "padded-batch-shared-position"),
)
def _right_in_one_row(patient: Patient) -> bool | None:
    lm = patient.lm()
    if not _wrong(lm, _ids(lm, rows=3), _PREFILL):
        return None
    return not _wrong(lm, _ids(lm), _PREFILL)


@symptom(
    "decode.right_in_one_layer",
    "one layer alone is right, two are not",
    "只有一层时正确，两层时出错",
    _DECODE,
    ("position-advances-per-layer",),
)
def _right_in_one_layer(patient: Patient) -> bool | None:
    two = patient.lm(num_layers=2)
    if two.config.num_layers != 2 or not _wrong(two, _ids(two), _PREFILL):
        return None
    one = patient.lm()
    return not _wrong(one, _ids(one), _PREFILL)


@symptom(
    "decode.first_step_right",
    "the first cached step is right, later ones are not",
    "第一步解码正确，之后出错",
    _DECODE,
    ("cache-dtype-promoted", "cached-keys-rotated-again", "rope-base-changes-mid-cache"),
)
def _first_step_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm)
    if not _wrong(lm, ids, 2, 1):
        return None
    return not any(_wrong(lm, ids[:, : prefill + 1], prefill) for prefill in (2, 3, 4))


@symptom(
    "decode.right_where_short",
    "with few tokens in the cache it is right, with more it is not",
    "cache 中 token 少时正确，多了就出错",
    _DECODE,
    ("cache-drops-oldest", "rope-base-changes-mid-cache", "ring-cache-overwritten", "window-ignored-in-decode"),
)
def _right_where_short(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm, length=8)
    if not _wrong(lm, ids, 7):
        return None
    return not _wrong(lm, ids[:, :3], 2)


@symptom(
    "decode.equal_tokens_right",
    "with all tokens equal it is right: what differs is where attention looks, not what it finds",
    "所有 token 相同时是对的：错的是 attention 看向哪里，而不是看到什么",
    _DECODE,
    ("position-restarts-in-decode", "cached-keys-rotated-again", "rope-base-changes-mid-cache", "alibi-lost-in-decode"),
)
def _equal_tokens_right(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = _ids(lm)
    if not _wrong(lm, ids, _PREFILL):
        return None
    return not _wrong(lm, torch.full_like(ids, 3), _PREFILL)


@symptom(
    "decode.chunk_sees_its_future",
    "within a chunk on a cache, a position sees the token after it",
    "一次送入多个 token 时，前面的位置看到了后面的 token",
    ("decode.chunks", "causality.through_cache"),
    ("chunk-unmasked", "bidirectional-mask"),
)
def _chunk_sees_its_future(patient: Patient) -> bool | None:
    lm = patient.lm()

    def first_of_chunk(ids: Tensor) -> Tensor:
        return lm.extend(ids[:, 3:], lm.extend(ids[:, :3])[1])[0][:, 0]

    return _influence(first_of_chunk, _ids(lm))[-1] > _SAME


@symptom(
    "decode.chunk_blind_to_its_past",
    "within a chunk on a cache, a position does not see the token before it",
    "一次送入多个 token 时，后面的位置看不到前一个 token",
    ("decode.chunks",),
    ("chunk-mask-top-left",),
)
def _chunk_blind_to_its_past(patient: Patient) -> bool | None:
    lm = patient.lm()
    return _influence(_cached_last(lm, 3), _ids(lm))[-2] <= _SAME


@symptom(
    "repair.positions_after_the_cache",
    "with the positions of the cached step moved by the cached length, the failing trial passes",
    "把解码那一步的位置加上已缓存的长度后，失败的例子就通过了",
    _DECODE,
    ("position-restarts-in-decode",),
)
def _positions_after_the_cache(patient: Patient) -> bool | None:
    return patient.passes_under(PositionsAfterTheCache, ("decode.cached_equals_full",))


# --- where it differs from the reference -----------------------------------------------------------------------------

_REFERENCE = ("reference.*",)


def _differs(patient: Patient, ids: Callable[[LM], Tensor] = _ids, **fixed: Any) -> bool | None:
    """Whether the logits are not those of the reference, over a configuration."""
    if patient.subject.reference is None:
        return None
    lm = patient.lm(**fixed)
    if any(getattr(lm.config, name) != value for name, value in fixed.items()):
        return None
    tokens = ids(lm)
    expected = patient.subject.reference(lm.config, lm.module.state_dict(), tokens)
    return _apart(lm.logits(tokens).double(), expected) > _SAME


def _right_when(patient: Patient, ids: Callable[[LM], Tensor] = _ids, **fixed: Any) -> bool | None:
    """Whether it is right under a restriction and wrong without it."""
    restricted = _differs(patient, ids, **fixed)
    if restricted is None or not _differs(patient, hidden_size=16, num_heads=4, num_kv_heads=2):
        return None
    return not restricted


@symptom(
    "reference.right_for_one_token",
    "one token alone is right: the bug is in how tokens attend to each other",
    "只有一个 token 时是对的：问题出在 token 之间的 attention",
    _REFERENCE,
    ("attention-scale-wrong", "rope-pairing-convention", "no-positions"),
)
def _right_for_one_token(patient: Patient) -> bool | None:
    return _right_when(patient, lambda lm: _ids(lm, length=1))


@symptom(
    "reference.right_for_equal_tokens",
    "with all tokens equal it is right: what differs is where attention looks, not what it finds",
    "所有 token 相同时是对的：错的是 attention 看向哪里，而不是看到什么",
    _REFERENCE,
    ("attention-scale-wrong", "rope-pairing-convention", "mask-hides-self", "no-positions"),
)
def _right_for_equal_tokens(patient: Patient) -> bool | None:
    return _right_when(patient, lambda lm: torch.full((1, _LENGTH), 3))


@symptom(
    "reference.right_without_groups",
    "with as many key heads as query heads it is right",
    "key 头数等于 query 头数时是对的",
    _REFERENCE,
    ("gqa-head-order",),
)
def _right_without_groups(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=16, num_heads=4, num_kv_heads=4)


@symptom(
    "reference.right_with_one_head",
    "with one head it is right",
    "只有一个头时是对的",
    _REFERENCE,
    ("heads-mixed-by-reshape", "gqa-head-order"),
)
def _right_with_one_head(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=4, num_heads=1, num_kv_heads=1)


@symptom(
    "reference.right_for_heads_of_two",
    "with heads of size 2 it is right: larger ones are paired otherwise",
    "头的大小为 2 时是对的：更大时两两配对的方式不同",
    _REFERENCE,
    ("rope-pairing-convention",),
)
def _right_for_heads_of_two(patient: Patient) -> bool | None:
    return _right_when(patient, hidden_size=8, num_heads=4, num_kv_heads=2)


@symptom(
    "repair.mask_against_the_reference",
    "with an exactly causal mask put into attention, it is right",
    "把 attention 的掩码换成严格的因果掩码后就对了",
    _REFERENCE,
    ("mask-hides-self",),
)
def _mask_against_the_reference(patient: Patient) -> bool | None:
    return patient.passes_under(CausalAttention, ("reference.logits",))


# --- which formula the loss is ---------------------------------------------------------------------------------------

_LOSS = ("loss.*", "training.*")


def _is_formula(patient: Patient, formula: Callable[[Tensor, Tensor], Tensor]) -> bool | None:
    """Whether the module's own loss is what ``formula`` makes of logits (B, T, V) and labels (B, T)."""
    lm = patient.lm(pad_token_id=0)
    ids = _ids(lm, rows=2)
    labels = ids.flip(1).clone()
    labels[0, 2:4] = IGNORED
    labels[1, -1] = 0
    seen, logits = lm.loss(ids, labels).detach().double(), lm.logits(ids).detach().double()
    expected = formula(logits, labels)
    return abs(float(seen) - float(expected)) <= 1e-6 * abs(float(expected))


def _entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def _formula(id: str, yes: str, yes_zh: str, cause: str, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    symptom(f"loss.is_{id}", yes, yes_zh, _LOSS, (cause,))(lambda patient: _is_formula(patient, formula))


_formula(
    "unshifted",
    "the loss is that of each position predicting its own token",
    "loss 是每个位置预测它自己",
    "labels-not-shifted",
    _entropy,
)
_formula(
    "shifted_twice",
    "the loss is that of each position predicting the token after the next",
    "loss 是每个位置预测再下一个 token",
    "labels-shifted-twice",
    lambda logits, labels: _entropy(logits[:, :-2], labels[:, 2:]),
)
_formula(
    "flattened_first",
    "the loss is that of rows laid end to end, the last position of one predicting the first token of the next",
    "loss 是各行首尾相接算出来的：上一行末尾预测下一行开头",
    "labels-flattened-before-shift",
    lambda logits, labels: _entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:]),
)
_formula(
    "over_all_positions",
    "the sum of the losses is divided by all positions, the ignored ones as well",
    "loss 之和除以了所有位置，连被忽略的也算",
    "loss-wrong-denominator",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:], "sum") / labels[:, 1:].numel(),
)
_formula(
    "over_all_tokens",
    "the sum of the losses is divided by all tokens, the first and the ignored ones as well",
    "loss 之和除以了所有 token，连第一个和被忽略的也算",
    "loss-wrong-denominator",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:], "sum") / labels.numel(),
)
_formula(
    "a_sum",
    "the losses are summed and not averaged",
    "loss 只求和，没有平均",
    "loss-wrong-denominator",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:], "sum"),
)
_formula(
    "mean_of_rows",
    "each row is averaged by itself, and then the rows",
    "先在每一行内平均，再对各行平均",
    "loss-wrong-denominator",
    lambda logits, labels: torch.stack(
        [_entropy(logits[row, :-1], labels[row, 1:]) for row in range(len(labels))]
    ).mean(),
)
_formula(
    "with_ignored",
    "ignored labels are scored as token 0",
    "被忽略的标签被当成 token 0 计分",
    "ignore-index-not-honoured",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:].clamp(min=0)),
)
_formula(
    "without_padding_tokens",
    "labels that equal the padding token are not scored",
    "等于 padding token 的标签没有计分",
    "pad-equals-eos-masked",
    lambda logits, labels: _entropy(logits[:, :-1], labels[:, 1:].masked_fill(labels[:, 1:] == 0, IGNORED)),
)
