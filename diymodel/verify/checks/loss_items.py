"""A loss that is told how many labels all micro-batches of one step hold, as transformers' Trainer tells it."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.verify.calling.signature import called, told_parameters
from diymodel.verify.checks.loss import coarse, draw_labels, scored
from diymodel.verify.failure import NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_ITEMS = "num_items_in_batch"


@check(
    "loss.items_in_batch",
    title="told how many labels there are in all micro-batches, the loss is the sum over its own by that number",
    step="2.2",
    needs=("loss",),
    causes=("accumulation-mean-of-means", "loss-wrong-denominator"),
)
def items_in_batch(trial: Trial) -> None:
    lm = trial.model()
    if lm.convention.labels is None or not _takes_items(lm.module):
        raise NotApplicable(f"forward has no {_ITEMS}")
    if lm.convention.loss_holds_term:
        raise NotApplicable("its loss holds a term that is no sum over labels")
    ids = trial.tokens(lm, min_length=2)
    labels = draw_labels(trial, lm, ids)
    own = scored(labels)
    items = own + trial.draw("others", st.integers(1, 16))
    told = lm.called(extra={**lm.convention.extra, _ITEMS: items})

    def expected() -> Tensor:
        return lm.loss(ids, labels) * own / items

    def rerun() -> Tensor:
        return coarse(expected(), lm.logits(ids))

    what = f"with {_ITEMS}={items}, {own} of them in this batch, the loss must be {own}/{items} of their mean"
    trial.same(told.loss(ids, labels), expected(), what, lm, rerun, scale=lm.logits(ids))


def _takes_items(module: nn.Module) -> bool:
    """Whether forward names the number, or has room for what Trainer tells every such model of transformers."""
    parameters = told_parameters(called(module))
    has_room = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    is_told = has_room and hasattr(module, "loss_function") and getattr(module, "accepts_loss_kwargs", True)
    return _ITEMS in parameters or bool(is_told)
