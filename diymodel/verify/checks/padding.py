"""Padding fills a rectangle and does nothing else: a padded row gives at its real positions what it gives alone."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError
from diymodel.verify.registry import check
from diymodel.verify.trial import MAX_LENGTH, Trial


@check(
    "padding.right_changes_nothing",
    title="a row padded on the right gives at its real positions what it gives alone",
    step="5.1",
    needs=("padding",),
    causes=(
        "statistic-over-sequence",
        "causal-dropped-with-mask",
        "padding-mask-inverted",
        "padded-batch-shared-position",
        "masked-nan-leaks",
        "masked-row-nan",
        "expert-capacity-drops-tokens",
    ),
)
def right_changes_nothing(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    real = trial.right_padding(ids, lm.convention.shortest)
    padded = lm.logits(ids, real)
    for row, length in enumerate(real.sum(1).tolist()):
        alone = ids[row : row + 1, :length]
        what = (
            f"row {row} with {length} real tokens and {ids.shape[1] - length} of padding must give what it gives alone"
        )
        trial.same(padded[row : row + 1, :length], lm.logits(alone), what, lm, partial(lm.logits, alone))


@check(
    "padding.left_changes_nothing",
    title="a row padded on the left gives at its real positions what it gives alone",
    step="5.1",
    needs=("left_padding",),
    causes=(
        "padded-batch-shared-position",
        "padding-mask-ignored",
        "position-ids-ignored",
        "mask-dropped-on-fast-path",
        "mask-hides-self",
        "masked-row-nan",
        "expert-capacity-drops-tokens",
    ),
)
def left_changes_nothing(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    real = trial.right_padding(ids, lm.convention.shortest).flip(1)
    padded = lm.logits(ids, real)
    for row, length in enumerate(real.sum(1).tolist()):
        alone = ids[row : row + 1, -length:]
        what = f"row {row}, {ids.shape[1] - length} of padding and then {length} real, must give what it gives alone"
        rerun = partial(lm.logits, alone)
        trial.same(padded[row : row + 1, -length:], lm.logits(alone), what, lm, rerun, moved=True)


@check(
    "padding.content_irrelevant",
    title="what stands at a padded position changes no logit of a real one",
    step="5.1",
    needs=("padding",),
    causes=(
        "statistic-over-sequence",
        "masked-nan-leaks",
        "mask-hides-self",
        "bidirectional-mask",
        "expert-capacity-drops-tokens",
    ),
)
def content_irrelevant(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    real = trial.right_padding(ids)
    shift = trial.draw("shift", st.integers(1, lm.config.vocab_size - 1))
    other = torch.where(real, ids, (ids + shift) % lm.config.vocab_size)
    what = f"other tokens at the padding (real lengths {real.sum(1).tolist()}) must change no logit of a real position"
    trial.same(lm.logits(other, real)[real], lm.logits(ids, real)[real], what, lm, lambda: lm.logits(ids, real))


@check(
    "padding.all_padding_finite",
    title="a row that is all padding stays finite and leaves the other rows alone",
    step="5.1",
    needs=("padding",),
    causes=("masked-row-nan", "statistic-over-batch"),
)
def all_padding_finite(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, rows=trial.draw("batch", st.integers(2, 3)))
    empty = trial.draw("empty_row", st.integers(0, ids.shape[0] - 1))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[empty] = False
    try:
        logits = lm.logits(ids, real)
    except SubjectError:
        raise
    except Exception as error:  # any error a stranger chooses is a refusal
        raise NotApplicable(f"a row without a real token is refused: {type(error).__name__}: {error}") from error
    if not bool(logits.isfinite().all()):
        # float64's smallest number is -inf once cast to the float32 that many a softmax works in: judge in float32.
        lm.cast(torch.float32)
        logits = lm.logits(ids, real)
    if not bool(logits.isfinite().all()):
        row, position = (int(i) for i in (~logits.isfinite()).nonzero()[0][:2])
        raise CheckFailure(
            f"with row {empty} all padding, every logit must be finite, saw a NaN or infinity at row {row}, "
            f"position {position}"
        )


@check(
    "padding.nan_contained",
    title="a NaN that stands at the padding reaches no real logit",
    step="5.1",
    needs=("padding", "nan_contained"),
    causes=("masked-nan-leaks", "statistic-over-sequence"),
)
def nan_contained(trial: Trial) -> None:
    lm = trial.model(MAX_LENGTH + 1)
    padding = lm.config.vocab_size - 1  # a token that stands at no real position
    left = trial.subject.missing("left_padding") is None and trial.draw("left", st.booleans())
    ids = trial.tokens(lm, min_length=2).clamp(max=padding - 1)
    real = trial.right_padding(ids)
    real = real.flip(1) if left else real
    ids = ids.where(real, padding)
    needed = ("cache", "padded_cache") if left else ("cache", "padded_cache", "ragged_cache")
    cached = all(trial.subject.missing(capability) is None for capability in (*needed, "cached_rows"))

    def run() -> Tensor:
        """Logits of the real positions, and of one more token on the cache of the padded rows."""
        logits = lm.logits(ids, real)[real]
        if cached:
            longer = F.pad(real, (0, 1), value=True)
            step, _ = lm.extend(ids.new_zeros(len(ids), 1), lm.extend(ids, None, real)[1], longer)
            logits = torch.cat((logits, step[:, -1]))
        return logits[:, :padding]  # with tied weights, the head's row of the padding token is NaN as well

    expected = run().detach()
    with torch.no_grad():
        lm.embedding().weight[padding] = torch.nan
    what = f"a NaN in the embedding of the padding (real tokens: {real.int().tolist()}) must change no real logit"
    trial.same(run(), expected, what, lm, run)
