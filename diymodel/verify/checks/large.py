"""What holds however large numbers become in training: the causal mask, the softmax of attention, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.causality import LEAKS, edited
from diymodel.verify.checks.loss import CAUSES, coarse, labels_of_ids, oracle
from diymodel.verify.experiments.first_overflow import where_first
from diymodel.verify.experiments.watchers import LargestScores, Scores
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.learning import trainable
from diymodel.verify.registry import check
from diymodel.verify.tolerance import float32_step, noise_factor, off_weights
from diymodel.verify.trial import Trial

_SHARPNESS = (300, 100, 30, 10, 3)  # scores grow with its square, and faster where it comes in by more than one way
_VOCABULARY = 23  # no other size of a module is that, unless it has sizes of its own
_TIMES = 1000
_TOO_SMALL = "mask-value-too-small"
_LARGE = 1e6  # far from 1e9, which some masks are made of and no score reaches


@check(
    "causality.large_scores",
    title="where the scores of attention are large, changing a token changes no earlier logit",
    step="1.1",
    needs=("causal",),
    causes=(_TOO_SMALL, *(leak for leak in LEAKS if leak != _TOO_SMALL)),
)
def large_scores(trial: Trial) -> None:
    lm, ids, _ = _with_large_scores(trial)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    other = edited(trial, lm, ids, cut)
    what = f"where scores of attention are large, another token at position {cut} must change no logit before it"

    def before() -> Tensor:
        return lm.logits(ids)[:, :cut]

    try:
        trial.same(lm.logits(other)[:, :cut], before(), what, lm, before)
    except CheckFailure as failure:
        if failure.max_abs_diff is not None and failure.max_abs_diff <= _moved_by_rounding(trial, lm, before):
            raise NotApplicable("the scores are so large that rounding decides") from failure
        raise


@check(
    "numerics.large_scores_finite",
    title="where the scores of attention are large, the logits are finite",
    step="5.2",
    causes=("softmax-without-maximum", "exp-before-mask", "decay-powers-overflow"),
)
def large_scores_finite(trial: Trial) -> None:
    lm, ids, scores = _with_large_scores(trial)
    if bool(lm.logits(ids).isfinite().all()):
        return
    if math.isfinite(scores.exponential):
        raise NotApplicable("something else than attention leaves the range of its type")
    raise CheckFailure(f"with large scores the logits must be finite, saw a NaN or infinity{where_first(lm, ids)}")


@check(
    "loss.large_logits",
    title="where the logits are large, the loss is their mean cross-entropy too",
    step="1.2",
    needs=("loss",),
    causes=("softmax-without-maximum", *CAUSES),
)
def large_logits(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, vocab_size=_VOCABULARY)
    ids = trial.tokens(lm, min_length=2)
    labels = labels_of_ids(lm, ids)
    heads = _of_tokens(lm)
    if not heads:
        raise NotApplicable("no matrix of the module has a row or a column for every token")
    with torch.no_grad():
        for weight in heads:
            weight.mul_(_TIMES)  # a norm takes it off an embedding
        logits = lm.logits(ids)
    if not float(logits.abs().max()) <= _LARGE:
        raise NotApplicable("with a larger head the logits are larger than any that are trained")

    def rerun() -> Tensor:
        return coarse(lm.loss(ids, labels), lm.logits(ids))

    what = f"with logits of up to {float(logits.abs().max()):.2g} the loss must be their mean cross-entropy"
    trial.same(lm.loss(ids, labels), oracle(lm, ids, labels), what, lm, rerun, scale=logits)


def _of_tokens(lm: LM) -> list[Tensor]:
    """The matrices with a row or a column for every token: embeddings, and the head."""
    return [p for p in lm.module.parameters() if p.dim() > 1 and lm.config.vocab_size in p.shape]


def _moved_by_rounding(trial: Trial, lm: LM, run: Callable[[], Tensor]) -> float:
    """How far roundings on the way may move what ``run()`` gives, which large scores blow up."""
    with lm.aside():
        step = float32_step(run) or torch.finfo(trial.dtype).eps
        return noise_factor(trial.dtype) * off_weights(lm.module, run, step / 2)


def _with_large_scores(trial: Trial) -> tuple[LM, Tensor, Scores]:
    """A module of one layer whose drawn weights make the scores large, tokens for it, and how large they are."""
    lm = trial.model(max_sharpness=1, num_layers=1, vocab_size=_VOCABULARY)
    ids = trial.tokens(lm, min_length=3)
    ids = ids[:, : (ids.shape[1] - 1) // 2 * 2 + 1]  # odd: two sizes of that are of pairs of tokens, and no width is
    for sharpness in _SHARPNESS:
        sharp = trial.build(lm.config, trial.values["weights"], sharpness)
        with torch.no_grad():
            for weight in _of_tokens(sharp):
                weight.div_(sharpness)  # a soft cap of the logits would hide what moves them
            for vector in (p for p in trainable(sharp).values() if p.dim() == 1):
                vector.mul_(sharpness)  # where queries and keys are normed, scores grow with the gains alone
        seen: list[Scores] = []
        watched = sharp.called()
        watched.around = partial(LargestScores, seen)
        with torch.no_grad():
            watched.logits(ids)
        if not seen:
            raise NotApplicable("no scores of attention were seen: no softmax over keys, and none of torch's attention")
        scores = Scores(*map(max, zip(*seen, strict=True)))
        if scores.largest <= _LARGE:
            return sharp, ids, scores
    raise NotApplicable("the drawn weights make the scores larger than any mask")
