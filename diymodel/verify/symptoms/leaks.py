"""Which later tokens a logit depends on, and what makes the leak go away.

Shapes: T query length.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from diymodel._compat import SDPBackend, sdpa_kernel
from diymodel.verify.adapters import LM
from diymodel.verify.experiments.repairs import CausalAttention, NoDropout, SoftmaxOverKeys
from diymodel.verify.experiments.watchers import SoftmaxesOverQueries
from diymodel.verify.experiments.watchers_of_places import Calls, WeighedPlaces
from diymodel.verify.learning import training_undone
from diymodel.verify.symptoms import SAME, Patient, apart, changed, distinct_tokens, influence, symptom
from diymodel.verify.symptoms.watched import looks_ahead, weights_of, weights_of_failures

_LEAKS = ("causality.*",)
_BY_VALUE = ("causality.edit", "causality.truncation", "causality.in_training")
_LONG = 9  # enough tokens that what a convolution sees of them ends before they do


def leaks_of(lm: LM, ids: Tensor) -> list[list[float]]:
    """For each position, how far each later token moves its logits."""
    return [
        influence(lambda tokens, t=t: lm.logits(tokens)[:, t], ids)[t + 1 :]  # type: ignore[misc]
        for t in range(ids.shape[1] - 1)
    ]


@symptom(
    "leak.next_token_only",
    "within one layer a position sees the token after it, and none further",
    "一层之内，每个位置只能看到它后面的那一个 token",
    _LEAKS,
    ("mask-sees-next-token",),
)
def _next_token_only(patient: Patient) -> bool | None:
    lm = patient.lm()
    leaks = leaks_of(lm, distinct_tokens(lm))
    beyond = max((leak for row in leaks for leak in row[1:]), default=0.0)
    nearest = max(row[0] for row in leaks)
    return None if nearest <= SAME and beyond <= SAME else beyond <= SAME


@symptom(
    "leak.of_fixed_width",
    "within one layer every position sees the same few tokens after it, and none further",
    "一层之内，每个位置都能看到后面固定的几个 token，再往后就看不到",
    _LEAKS,
    ("convolution-not-causal", "mask-sees-next-token"),
)
def _of_fixed_width(patient: Patient) -> bool | None:
    lm = patient.lm()
    seen = [[leak > SAME for leak in row] for row in leaks_of(lm, distinct_tokens(lm, length=_LONG))]
    if not any(map(any, seen)):
        return None
    width = sum(seen[0])
    return 0 < width < _LONG // 2 and all(row == [ahead < width for ahead in range(len(row))] for row in seen)


@symptom(
    "leak.without_attention",
    "the future leaks in, and there is no attention: no softmax weighs the tokens",
    "未来的信息泄漏了，而模型里没有 attention：没有任何 softmax 在给各个 token 加权",
    _LEAKS,
    ("convolution-not-causal",),
)
def _without_attention(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if max(influence(lambda tokens: lm.logits(tokens)[:, 0], ids)[1:]) <= SAME:
        return None
    softmaxes: list[bool] = []
    lm.around = partial(SoftmaxesOverQueries, softmaxes)
    lm.logits(ids)
    if softmaxes:
        return False
    # A softmax may weigh the tokens of a block.
    return None if _calls_softmax(lm, ids) or _weighs_places(lm, ids) else True


def _calls_softmax(lm: LM, ids: Tensor) -> bool:
    calls = Calls()
    lm.around = lambda start, length: calls
    lm.logits(ids)
    lm.around = None
    return "softmax" in calls.names


def _weighs_places(lm: LM, ids: Tensor) -> bool:
    """Whether values are multiplied with numbers of each pair of places that follow from the tokens."""
    seen: list[list[Tensor]] = []
    for tokens in (ids, ids.roll(1, 1)):
        seen.append([])
        lm.around = partial(WeighedPlaces, seen[-1])
        lm.logits(tokens)
    lm.around = None
    return any(not torch.equal(*pair) for pair in zip(*seen, strict=True))


@symptom(
    "leak.one_token_alone",
    "one token alone gives something else than at the beginning of a row; two tokens, or more, do not",
    "只有一个 token 时的结果与它作为一行开头时不同；两个或更多 token 时则没有差别",
    ("causality.truncation", "causality.long_row"),
    ("cached-path-diverges",),
    settles=("causality.truncation", "causality.long_row"),
)
def _one_token_alone(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    whole = lm.logits(ids)
    differs = [apart(lm.logits(ids[:, :end]), whole[:, :end]) > SAME for end in range(1, ids.shape[1])]
    return differs[0] and not any(differs[1:]) if any(differs) else None


@symptom(
    "leak.of_all_tokens",
    "within one layer a position sees all tokens after it",
    "一层之内，每个位置能看到后面的所有 token",
    _LEAKS,
    ("bidirectional-mask", "mask-dropped-on-fast-path", "softmax-wrong-axis", "statistic-over-sequence"),
)
def _all_tokens(patient: Patient) -> bool | None:
    lm = patient.lm()
    return all(leak > SAME for row in leaks_of(lm, distinct_tokens(lm)) for leak in row)


@symptom(
    "leak.faint",
    "what a position sees of the future is a twentieth of what it sees of its past",
    "看到的未来只有看到的过去的二十分之一",
    _LEAKS,
    ("mask-value-too-small",),
)
def _faint(patient: Patient) -> bool | None:
    lm = patient.lm(sharpness=1)
    ids = distinct_tokens(lm)
    if not weights_of(lm, lambda: lm.logits(ids)):
        return None  # there are no scores for a mask to be added to
    future = max(leak for row in leaks_of(lm, ids) for leak in row)
    past = influence(lambda tokens: lm.logits(tokens)[:, -1], ids)[:-1]
    return None if future <= SAME else future < 0.05 * max(past)


@symptom(
    "leak.blind_to_order",
    "exchanging two later tokens changes nothing, though changing one does: something is averaged over the sequence",
    "交换后面两个 token 没有影响，改掉其中一个却有：有东西对整个序列做了平均",
    _LEAKS,
    ("statistic-over-sequence", "mask-value-too-small"),
)
def _blind_to_order(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    exchanged = ids.clone()
    exchanged[:, -2:] = ids[:, -2:].flip(1)
    plain = lm.logits(ids)[:, 0]
    if apart(lm.logits(changed(ids, -1))[:, 0], plain) <= SAME:
        return None
    return apart(lm.logits(exchanged)[:, 0], plain) <= SAME


@symptom(
    "leak.on_some_paths",
    "it leaks on some paths and not on others: with and without gradients, under one attention kernel or another",
    "有的路径泄漏，有的不泄漏：开关梯度、换 attention kernel，结果不同",
    ("causality.*", "training.*"),
    ("mask-dropped-on-fast-path", "attention-backends-disagree"),
)
def _on_some_paths(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    found = set()
    for path in (torch.enable_grad, torch.no_grad, partial(sdpa_kernel, SDPBackend.MATH)):
        with path():
            found.add(influence(lambda tokens: lm.logits(tokens)[:, 0], ids)[1] > SAME)
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
    lm.around = lambda start, T: training_undone(lm.module)
    return max(leak for row in leaks_of(lm, distinct_tokens(lm)) for leak in row) <= SAME


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
    passes = patient.passes_under(CausalAttention, (*_BY_VALUE, "decode.chunks"))
    if passes is False:
        seen = weights_of_failures(patient, _BY_VALUE)
        if not any(bool(weights.isnan().any()) for weights in seen) and looks_ahead(seen):
            return None  # what leaks beside it hides whether the mask is at fault as well
        lm = patient.lm()
        ids = distinct_tokens(lm)
        if not seen and not _calls_softmax(lm, ids) and _weighs_places(lm, ids):
            return None  # the repair knows no weights but a softmax's
    return passes


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
    ("dropout-active-in-eval", "mode-flag-copied", "mode-not-restored"),
)
def _no_dropout(patient: Patient) -> bool | None:
    checks = ("forward.deterministic", "causality.edit", "decode.cached_equals_full", "modes.dropout_off_in_eval")
    return patient.passes_under(NoDropout, checks)
