"""Long rows: windows, chunks, buckets and blocks have sizes that no example on paper reaches.

A row's tokens follow from a seed, and its length shrinks, to the first at which the property fails.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.causality import must_not_need_what_follows
from diymodel.verify.checks.loss import labels_of_ids
from diymodel.verify.convention import IGNORED
from diymodel.verify.failure import CheckFailure, NotApplicable, first_of
from diymodel.verify.learning import gradients_of, next_token_loss, trainable
from diymodel.verify.registry import check
from diymodel.verify.trial import LONGEST, MAX_LENGTH, Trial

_ROWS = 4  # so many of the longest hold more labels than the usual 1,024 of a chunk of a loss
_STEPS = 3
_SHORTEST = 4  # tokens whose gradients are looked at
_ORDINARY = 1e9  # gradients of that size, in float64, are far from what float32 cannot hold


def _long(trial: Trial, rows: int = 1) -> tuple[LM, Tensor]:
    """A model that holds the longest row, and token ids (B, T)."""
    lm = trial.model(length=LONGEST, max_sharpness=1)
    longest = min(LONGEST, lm.config.max_seq_len)
    if longest <= MAX_LENGTH:
        raise NotApplicable(f"the module holds no more than {longest} positions, which other checks fill")
    any_length = st.integers(MAX_LENGTH + 1, longest)
    length = trial.draw("length", any_length | st.just(longest))
    generator = torch.Generator().manual_seed(trial.draw("tokens_seed", st.integers(0, 2**16)))
    ids = torch.randint(lm.config.vocab_size, (rows, length), generator=generator)
    return lm, ids.to(trial.device)


@check(
    "causality.long_row",
    title="cutting off the end of a long row changes no earlier logit",
    step="1.1",
    needs=("causal",),
    causes=(
        "mask-dropped-on-fast-path",
        "chunk-size-changes-logits",
        "statistic-over-sequence",
        "bidirectional-mask",
        "expert-capacity-drops-tokens",
        "heads-mixed-by-reshape",
        "recurrence-grows",
    ),
)
def causality_of_a_long_row(trial: Trial) -> None:
    must_not_need_what_follows(trial, *_long(trial))


@check(
    "decode.long_row",
    title="the end of a long row gives the same logits on a cache as in the whole row",
    step="3.2",
    needs=("cache", "causal"),
    causes=(
        "cache-drops-oldest",
        "window-ignored-in-decode",
        "cached-keys-rotated-again",
        "rope-base-changes-mid-cache",
        "position-table-clamped",
        "chunk-size-changes-logits",
        "ring-cache-overwritten",
        "cached-path-diverges",
    ),
)
def decode_of_a_long_row(trial: Trial) -> None:
    lm, ids = _long(trial)
    T = ids.shape[1]
    edges = [0, *range(T - _STEPS, T + 1)]
    if trial.takes_chunks:
        edges.insert(1, trial.draw("prefill", st.integers(1, T - _STEPS - 1)))
    full = lm.logits(ids)
    past = None
    for start, end in itertools.pairwise(edges):
        logits, past = lm.extend(ids[:, start:end], past)
        what = f"tokens {start} to {end - 1} of {T} on a cache of {start} must give the uncached logits"
        trial.same(logits[:, -1], full[:, end - 1], what, lm, lambda: lm.logits(ids))


@check(
    "loss.many_labels",
    title="the loss of a long batch is the mean cross-entropy over all its labels",
    step="1.2",
    needs=("loss",),
    causes=("loss-wrong-denominator", "ignore-index-not-honoured"),
)
def loss_of_many_labels(trial: Trial) -> None:
    lm, ids = _long(trial, trial.draw("rows", st.integers(1, _ROWS) | st.just(_ROWS)))
    live = trial.draw("live_rows", st.integers(1, len(ids)) | st.just(len(ids)))
    labels = labels_of_ids(lm, ids)
    if trial.subject.missing("labels") is None:
        labels[live:, trial.draw("live_labels", st.integers(1, ids.shape[1] - 1)) :] = IGNORED

    def oracle() -> Tensor:
        return F.cross_entropy(lm.logits(ids).double()[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def rerun() -> Tensor:
        return torch.stack((lm.loss(ids, labels).double(), oracle()))

    scored = int((labels[:, 1:] != IGNORED).sum())
    what = f"the loss over {scored} of {labels[:, 1:].numel()} labels must be their mean cross-entropy"
    trial.same(lm.loss(ids, labels), oracle(), what, lm, rerun, scale=lm.logits(ids))


@check(
    "gradients.long_row_finite",
    title="in float32 the gradients of a long row are finite",
    step="1.2",
    needs=("graph",),
    causes=(
        "exp-before-mask",
        "softmax-without-maximum",
        "masked-row-nan",
        "recurrence-grows",
        "decay-powers-overflow",
    ),
)
def gradients_of_a_long_row(trial: Trial) -> None:
    if trial.dtype != torch.float64:
        raise NotApplicable(f"in {trial.dtype} there are no gradients of float64 to tell an overflow by")
    lm, ids = _long(trial)
    times = trial.draw("vectors_times", st.sampled_from((1, 4, -1)))
    with torch.no_grad():
        for vector in (parameter for parameter in trainable(lm).values() if parameter.dim() == 1):
            vector.mul_(times)  # decays are made of vectors, and hardly decay as built

    def gradients(row: Tensor) -> dict[str, Tensor]:
        found = gradients_of(next_token_loss(lm, row), trainable(lm))
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    while not _are_ordinary(exact := gradients(ids)):
        nans = [name for name, gradient in exact.items() if bool(gradient.isnan().any())]
        if nans and bool(lm.logits(ids).isfinite().all()):
            raise CheckFailure(
                f"every gradient of a row of {ids.shape[1]} tokens must be finite, as its logits are, "
                f"saw NaN at {first_of(nans)}"
            )
        if ids.shape[1] < 2 * _SHORTEST:
            raise NotApplicable("the drawn weights make the gradients of a long row grow beyond any use")
        ids = ids[:, : ids.shape[1] // 2]
    lm.cast(torch.float32)
    if wrong := [name for name, gradient in gradients(ids).items() if not bool(gradient.isfinite().all())]:
        raise CheckFailure(
            f"in float32 every gradient of a row of {ids.shape[1]} tokens must be finite, as it is in float64, "
            f"saw NaN or infinity at {first_of(wrong)}"
        )


def _are_ordinary(gradients: dict[str, Tensor]) -> bool:
    return all(float(gradient.abs().max()) < _ORDINARY for gradient in gradients.values())
