"""Labels are for the loss: the logits are the same without them.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import NotApplicable, SubjectError, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "loss.labels_change_no_logit",
    title="a call with labels gives the logits of the call without them",
    step="1.2",
    needs=("loss",),
    causes=("labels-change-logits",),
)
def labels_change_no_logit(trial: Trial) -> None:
    lm = trial.model()
    name = lm.convention.labels
    if name is None:
        raise NotApplicable("forward takes no labels")
    ids = trial.tokens(lm, min_length=2)
    without = _called(lm, labelled=False).logits(ids)  # of the last position alone, where the module gives no more
    if not bool(without.isfinite().all()):
        raise NotApplicable("without labels, the logits are not finite")
    with_them = _with_labels(lm, ids)[:, -without.shape[1] :]
    trial.same(with_them, without, f"with {name}, the logits must be those without", lm, lambda: _with_labels(lm, ids))


def _with_labels(lm: LM, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of the call that gives the loss.

    Raises:
        NotApplicable: it gives no logits, or not one for each token.
    """
    try:
        logits = _called(lm, labelled=True).logits(ids)
    except SubjectError as error:
        raise NotApplicable(f"with {lm.convention.labels} {said(error)}") from error
    if logits.shape[1] != ids.shape[1]:
        raise NotApplicable(f"with {lm.convention.labels} forward gives logits of {logits.shape[1]} positions")
    return logits


def _called(lm: LM, labelled: bool) -> LM:
    called = LM(lm.module, lm.config, replace(lm.convention, logits_need_labels=labelled))
    called.around = lm.around
    return called
