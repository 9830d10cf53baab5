"""Padding that stands in a cache: padded rows are continued as if each were alone."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.strategies import chunk_sizes, real_lengths
from diymodel.verify.trial import Trial


@st.composite
def _real_lengths(draw: st.DrawFn, rows: int, sizes: list[int]) -> list[list[int]]:
    """Of each chunk, how many tokens of each row are real."""
    return [draw(real_lengths(rows, size)) for size in sizes]


def _continue(
    trial: Trial, lm: LM, ids: Tensor, real: Tensor, sizes: list[int], side: str, untold: bool = False
) -> None:
    """Feed padded rows (B, T) in chunks; at its real positions each row must give what it gives alone.

    Args:
        untold: hold them to the padded rows without a cache, which were seen to give that and read the same entries of
            a table of positions, where another entry is rounded otherwise.
    """
    past, start = None, 0
    if untold:
        alone = [logits[kept] for logits, kept in zip(lm.logits(ids, real), real, strict=True)]
    else:
        alone = [lm.logits(row[kept][None])[0] for row, kept in zip(ids, real, strict=True)]
    place = real.long().cumsum(1) - 1  # of each token among its row's real ones
    for size in sizes:
        end = start + size
        logits, past = lm.extend(ids[:, start:end], past, real[:, :end])
        if logits.shape[1] < size:  # the last position's only, as in many modules that decode
            if not bool(real[:, end - 1].all()):
                raise NotApplicable("a cached call gives the logits of the last position only, which may be padding")
            start = end - logits.shape[1]
        for row, kept in enumerate(real[:, start:end]):
            expected = alone[row][place[row, start:end][kept]]
            what = (
                f"row {row}, padded on the {side} (real: {real[row].int().tolist()}), must give at slots {start} to "
                f"{end - 1}, on a cache of {start}, what it gives {'without one' if untold else 'alone'}"
            )
            only = ids[row][real[row]][None]
            trial.same(logits[row][kept], expected, what, lm, partial(lm.logits, only), moved=True)
        start = end


@check(
    "padding.left_with_cache",
    title="rows padded on the left are continued on the cache as each alone",
    step="5.1",
    needs=("left_padding", "cache", "padded_cache", "causal"),
    causes=(
        "padding-mask-lost-in-decode",
        "padded-batch-shared-position",
        "position-ids-ignored",
        "position-from-kept-length",
    ),
)
def left_with_cache(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    B, T = ids.shape
    prefill = T - trial.draw("steps", st.integers(1, T - 1))
    lengths = trial.draw("lengths", real_lengths(B, prefill))
    real = torch.arange(T, device=trial.device) >= prefill - torch.tensor(lengths, device=trial.device)[:, None]
    sizes = [prefill, *[1] * (T - prefill)]
    _continue(trial, lm, ids, real, sizes, "left")
    if lm.convention.pads_left_untold:
        _continue(trial, lm.called(positions=None), ids, real, sizes, "left", untold=True)


@check(
    "padding.right_with_cache",
    title="rows padded on the right are continued on the cache from their own last token",
    step="5.1",
    needs=("padding", "ragged_cache", "cache", "padded_cache", "right_padded_cache", "causal"),
    causes=(
        "padded-batch-shared-position",
        "position-ids-ignored",
        "padding-mask-lost-in-decode",
        "position-from-kept-length",
    ),
)
def right_with_cache(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    B, T = ids.shape
    sizes = trial.draw("chunks", chunk_sizes(T))
    if not trial.takes_chunks:
        sizes = [sizes[0], *[1] * (T - sizes[0])]
    lengths = trial.draw("lengths", _real_lengths(B, sizes))
    columns = [torch.arange(size) < torch.tensor(real)[:, None] for size, real in zip(sizes, lengths, strict=True)]
    real = torch.cat(columns, 1).to(trial.device)
    _continue(trial, lm, ids, real, sizes, "right")


@check(
    "padding.content_irrelevant_with_cache",
    title="what stood at a padded position changes no logit that is computed on the cache",
    step="5.1",
    needs=("padding", "cache", "padded_cache", "causal"),
    causes=("padding-mask-lost-in-decode", "statistic-over-sequence"),
)
def content_irrelevant_with_cache(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    left = trial.subject.missing("left_padding") is None and trial.draw("left", st.booleans())
    if not left and (why := trial.subject.missing("right_padded_cache")) is not None:
        raise NotApplicable(why)
    prefill = ids.shape[1] - trial.draw("steps", st.integers(1, ids.shape[1] - 2))
    real = trial.right_padding(ids[:, :prefill])
    real = F.pad(real.flip(1) if left else real, (0, ids.shape[1] - prefill), value=True)
    shift = trial.draw("shift", st.integers(1, lm.config.vocab_size - 1))
    other = torch.where(real, ids, (ids + shift) % lm.config.vocab_size)

    def decoded(tokens: Tensor) -> Tensor:
        """Logits (B, T - prefill, V) of the cached steps."""
        _, past = lm.extend(tokens[:, :prefill], None, real[:, :prefill])
        steps = []
        for t in range(prefill, ids.shape[1]):
            logits, past = lm.extend(tokens[:, t : t + 1], past, real[:, : t + 1])
            steps.append(logits[:, -1])
        return torch.stack(steps, 1)

    what = f"other tokens at the padding of the prefill (real: {real.int().tolist()}) must change no logit of the steps"
    trial.same(decoded(other), decoded(ids), what, lm, lambda: decoded(ids))
