"""A sliding window: how far back a position sees."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from diymodel.verify.checks.causality import edited
from diymodel.verify.checks.sensitivity import WIDE, differs_for_some_weights
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_WIDEST = 512  # a tiny module of a wider window takes seconds for what a narrow one shows in milliseconds


@check(
    "window.width",
    title="one layer sees as many positions as its window is wide, and no more",
    step="1.1",
    needs=("causal", "window"),
    causes=("window-off-by-one", "mask-hides-self"),
)
def width(trial: Trial) -> None:
    window = trial.subject.window
    assert window is not None
    if window > _WIDEST:
        raise NotApplicable(f"a window of {window} is too wide to try: build the subject with one of a few positions")
    beyond = trial.draw("beyond", st.integers(0, 3))
    lm = trial.model(length=window + 1 + beyond, num_layers=1, **WIDE)  # deeper layers see what earlier ones saw
    ids = trial.tokens(lm, min_length=window + 1, max_length=window + 1 + beyond)
    other = edited(trial, lm, ids, 0)
    before, after = lm.logits(ids), lm.logits(other)
    after = torch.cat((before[:, :window], after[:, window:]), 1)
    what = f"with a window of {window}, changing the first token must change no logit {window} or more positions later"
    trial.same(after, before, what, lm, lambda: lm.logits(ids))
    if not differs_for_some_weights(trial, lm, ids, other, window - 1):
        raise CheckFailure(
            f"with a window of {window}, changing the first token must change the logits {window - 1} positions later, "
            "saw no change"
        )
