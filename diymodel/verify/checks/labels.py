"""Labels are for the loss: the logits are the same without them.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

from diymodel.verify.failure import NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "loss.labels_change_no_logit",
    title="a call with labels gives the logits of the call without them",
    step="1.2",
    needs=("labelled_logits",),
    causes=("labels-change-logits",),
)
def labels_change_no_logit(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    without, labelled = (lm.called(logits_need_labels=labelled) for labelled in (False, True))
    expected = without.logits(ids)  # of the last position alone, where the module gives no more
    if not bool(expected.isfinite().all()):
        raise NotApplicable("without labels, the logits are not finite")
    seen = labelled.logits(ids)[:, -expected.shape[1] :]
    what = f"with {lm.convention.labels}, the logits must be those without"
    trial.same(seen, expected, what, lm, lambda: without.logits(ids))
