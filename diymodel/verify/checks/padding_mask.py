"""A mask that is taken hides what it says."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from diymodel.verify.failure import CheckFailure, NotApplicable, refusal
from diymodel.verify.learning import distinct_tokens
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_MATTERS = 1e-6  # of the largest logit: another token there moves what comes after it by more


@check(
    "padding.mask_is_used",
    title="hiding a token by the mask changes what later tokens give, or is refused",
    step="5.1",
    needs=("hiding", "causal"),
    causes=("padding-mask-ignored",),
)
def mask_is_used(trial: Trial) -> None:
    # On the right a causal model needs no mask. Padding on the left, and generating for such rows, do.
    lm = trial.model()
    first_alone = trial.missing("padding") is not None  # and the module is told where each row begins
    name = lm.convention.left if first_alone else lm.convention.mask
    if lm.convention.lengths:
        raise NotApplicable(f"forward({lm.convention.lengths}=…) can hide no token that stands before others")
    ids = distinct_tokens(trial, lm, 2)  # an average over equal tokens is the same without one of them
    hidden = trial.draw("hidden", st.integers(0, 0 if first_alone else ids.shape[1] - 2))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, hidden] = False
    if (why := refusal(lm.logits, ids, real)) is not None:
        raise NotApplicable(f"a token that stands before others cannot be hidden: {why}")
    other = ids.clone()
    other[:, hidden] = (ids[:, hidden] + 1) % lm.config.vocab_size
    calls = lm.logits(ids), lm.logits(other), lm.logits(ids, real), lm.logits(other, real)
    plain, changed, *masked = (logits.detach()[:, hidden + 1 :] for logits in calls)
    matters = float((changed - plain).abs().max()) > _MATTERS * float(plain.abs().max())
    # One of the two tokens is attended to then; the other may have a weight that rounds to 0.
    if matters and torch.equal(masked[0], plain) and torch.equal(masked[1], changed):
        raise CheckFailure(
            f"hiding the token at position {hidden} of {ids.tolist()} by {name} must change the logits "
            "after it, which depend on that token, saw the very same: the mask is taken and ignored"
        )
