"""Facts that hold for any forward pass: shape, finiteness, determinism, rows that do not meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from diymodel.verify.experiments.first_overflow import where_first
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "shape.logits",
    title="logits are (batch, seq, vocab), finite numbers",
    step="1.1",
    causes=("masked-row-nan", "softmax-overflow-half"),
)
def logits_shape(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    logits = lm.logits(ids)
    expected = (*ids.shape, lm.config.vocab_size)
    if tuple(logits.shape) != expected:
        raise CheckFailure(f"logits must be (batch, seq, vocab) = {expected}, saw {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise CheckFailure(f"logits must be floating-point numbers, saw {logits.dtype}")
    if not bool(logits.isfinite().all()):
        row, position = (int(i) for i in (~logits.isfinite()).nonzero()[0][:2])
        raise CheckFailure(
            f"logits must be finite, saw a NaN or infinity at row {row}, position {position}{where_first(lm, ids)}",
            not_finite=True,
        )


@check(
    "shape.shortest",
    title="the shortest input, one token where that is legal, gives finite logits",
    step="1.1",
    causes=("statistic-over-sequence", "masked-row-nan"),
)
def shortest(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, max_length=1)  # or as many as the module asks for
    logits = lm.logits(ids)
    expected = (*ids.shape, lm.config.vocab_size)
    strange = int((~logits.isfinite()).sum())
    if tuple(logits.shape) != expected or strange:
        raise CheckFailure(
            f"token ids of shape {tuple(ids.shape)} are the shortest and must give finite logits of shape {expected}, "
            f"saw {tuple(logits.shape)}, {strange} of them NaN or infinite{where_first(lm, ids)}",
            not_finite=strange > 0,
        )


@check(
    "shape.longest",
    title="a sequence of max_seq_len tokens is accepted",
    step="1.1",
    causes=("position-table-clamped",),
)
def longest(trial: Trial) -> None:
    lm = trial.model()
    ids = torch.arange(lm.config.max_seq_len, device=trial.device)[None] % lm.config.vocab_size
    try:
        logits = lm.logits(ids)
    except Exception as error:  # whatever a stranger's forward raises
        lm.logits(ids[:, : lm.convention.shortest])  # which raises by itself where the length is not at fault
        what = f"{ids.shape[1]} tokens are max_seq_len and must be accepted, saw {type(error).__name__}: {error}"
        raise CheckFailure(what) from error
    strange = int((~logits.isfinite()).sum())
    if strange and not bool(lm.logits(ids[:, :-1]).isfinite().all()):
        raise NotApplicable("one token fewer gives no finite logits either: see shape.logits")
    if logits.shape[1] != ids.shape[1] or strange:
        raise CheckFailure(
            f"{ids.shape[1]} tokens are max_seq_len and must give finite logits, saw shape {tuple(logits.shape)}, "
            f"{strange} of them NaN or infinite{where_first(lm, ids)}",
            not_finite=strange > 0,
        )


@check(
    "forward.deterministic",
    title="in eval mode, two equal calls give equal logits, whatever was called in between",
    step="3.3",
    causes=("state-survives-calls", "dropout-active-in-eval", "mode-flag-copied", "mode-not-restored"),
)
def deterministic(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    other = trial.draw("other_length", st.integers(1, ids.shape[1]))
    first = lm.logits(ids)
    lm.logits(ids[:1, :other].flip(1))
    trial.same(
        lm.logits(ids), first, "a repeated call in eval mode must give the same logits", lm, lambda: lm.logits(ids)
    )


@check(
    "forward.inputs_unchanged",
    title="the token ids are not written to",
    step="1.3",
    causes=("inputs-written-in-place",),
)
def inputs_unchanged(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    before = ids.clone()
    lm.logits(ids)
    if not torch.equal(ids, before):
        raise CheckFailure(f"input_ids must stay {before.tolist()}, saw {ids.tolist()} after the call")


@check(
    "forward.memory_layout",
    title="token ids that do not lie row by row in memory give the same logits",
    step="1.3",
    causes=("contiguous-input-assumed",),
)
def memory_layout(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    views = {
        "in longer rows": F.pad(ids, (0, 1))[:, :-1],
        "column by column": ids.t().contiguous().t(),
        "in every second place": ids.repeat_interleave(2, 1)[:, ::2],
    }
    layout = trial.draw("layout", st.sampled_from(tuple(views)))
    view = views[layout]
    what = f"token ids that lie in memory {layout} must give the logits of a contiguous copy"
    lm.keep_layout = True
    try:
        seen = lm.logits(view)
    except SubjectError:
        raise
    except Exception as error:  # whatever a stranger's forward raises
        lm.keep_layout = False
        lm.logits(ids)  # which raises by itself where the layout is not at fault
        raise CheckFailure(f"{what}, saw {said(error)}") from error
    trial.same(seen, lm.logits(ids), what, lm, lambda: lm.logits(ids))


@check(
    "batch.row_alone",
    title="a row gives the same logits alone as in a batch",
    step="1.1",
    needs=("rows",),
    causes=("statistic-over-batch", "cache-rows-shared", "expert-capacity-drops-tokens"),
)
def row_alone(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, rows=trial.draw("batch", st.integers(2, 3)))
    row = trial.draw("row", st.integers(0, ids.shape[0] - 1))
    alone = lm.logits(ids[row : row + 1])
    what = f"row {row} of a batch of {ids.shape[0]} must give what it gives alone"
    trial.same(lm.logits(ids)[row : row + 1], alone, what, lm, lambda: lm.logits(ids[row : row + 1]))


@check(
    "batch.permutation",
    title="permuting the rows of a batch permutes its logits",
    step="1.1",
    needs=("rows",),
    causes=(
        "cache-rows-shared",
        "padded-batch-shared-position",
        "statistic-over-batch",
        "beam-reorder-skipped",
        "expert-capacity-drops-tokens",
    ),
)
def permutation(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, rows=trial.draw("batch", st.integers(2, 3)))
    order = trial.draw("order", st.permutations(range(ids.shape[0])))
    what = f"rows in the order {order} must give their logits in that order"
    trial.same(lm.logits(ids[order]), lm.logits(ids)[order], what, lm, lambda: lm.logits(ids))
