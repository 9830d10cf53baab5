"""The logits are those of an independent implementation, which the subject names.

Every other property holds the model against itself, and so is blind to what is wrong in every call alike.
"""

from __future__ import annotations

from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_LENGTH = 4  # a reference may be plain loops


@check(
    "reference.logits",
    title="the logits are those of the reference with the same weights",
    step="1.1",
    needs=("reference",),
    causes=(
        "attention-scale-wrong",
        "rope-pairing-convention",
        "gqa-head-order",
        "heads-mixed-by-reshape",
        "activation-wrong",
        "router-weights-not-normalised",
        "no-positions",
        "mask-hides-self",
    ),
)
def logits(trial: Trial) -> None:
    lm = trial.model(_LENGTH)
    ids = trial.tokens(lm, max_length=_LENGTH)
    reference = trial.subject.reference
    assert reference is not None
    state = {name: value.detach().cpu() for name, value in lm.module.state_dict().items()}
    expected = reference(lm.config, state, ids.cpu()).to(trial.device)
    what = "with the same weights the logits must be those of the reference"
    trial.same(lm.logits(ids), expected, what, lm, lambda: lm.logits(ids))
