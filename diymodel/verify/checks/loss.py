"""The module's own loss: next-token cross-entropy, averaged over the scored labels."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import IGNORED, LM
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_CAUSES = (
    "labels-not-shifted",
    "labels-shifted-twice",
    "labels-flattened-before-shift",
    "ignore-index-not-honoured",
    "loss-wrong-denominator",
)


def _labels(trial: Trial, ids: Tensor) -> Tensor:
    """Labels (B, T) that differ from the tokens, most often partly ignored; at least one is live."""
    B, T = ids.shape
    places = st.sampled_from([[row, position] for row in range(B) for position in range(1, T)])
    live = trial.draw("live", st.lists(places, min_size=1, max_size=B * T))
    shift = trial.draw("label_shift", st.integers(0, int(ids.max()) or 1))
    labels = torch.full_like(ids, IGNORED)
    for row, position in live:
        labels[row, position] = (ids[row, position] + shift) % (int(ids.max()) + 1)
    if trial.draw("label_of_first", st.booleans()):  # no position predicts it
        labels[:, 0] = ids[:, 0]
    return labels


def _oracle(lm: LM, ids: Tensor, labels: Tensor) -> Tensor:
    """-log p of every live label, position t - 1 predicting label t, by explicit log-sum-exp; their mean."""
    logits = lm.logits(ids).double()
    losses = [
        logits[row, position - 1].logsumexp(0) - logits[row, position - 1, labels[row, position]]
        for row in range(ids.shape[0])
        for position in range(1, ids.shape[1])
        if labels[row, position] != IGNORED
    ]
    return torch.stack(losses).mean()


@check(
    "loss.value",
    title="the loss is the mean next-token cross-entropy over the labels that are not ignored",
    step="1.2",
    needs=("loss",),
    causes=_CAUSES,
)
def value(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    labels = _labels(trial, ids)
    loss = lm.loss(ids, labels)

    def rerun() -> Tensor:
        """The loss, and the logits as coarse as it: many modules take the loss in float32."""
        again = lm.loss(ids, labels)
        return torch.cat((again.reshape(1), lm.logits(ids).to(again.dtype).flatten()))

    what = f"the loss for labels {labels.tolist()} must be their mean cross-entropy"
    trial.same(loss, _oracle(lm, ids, labels), what, lm, rerun, scale=lm.logits(ids))


@check(
    "loss.gradient",
    title="the gradient of the loss is that of the mean next-token cross-entropy",
    step="1.2",
    needs=("loss",),
    causes=("gradient-detached", *_CAUSES),
)
def gradient(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    ids = trial.tokens(lm, min_length=2)
    labels = _labels(trial, ids)
    named = {name: p for name, p in lm.module.named_parameters() if p.requires_grad}

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)]

    def rerun() -> Tensor:
        with torch.enable_grad():
            return torch.cat([g.flatten() for g in gradients(lm.loss(ids, labels))])

    expected = gradients(_oracle(lm, ids, labels))
    scale = torch.stack([g.abs().max() for g in expected])
    for name, seen, right in zip(named, gradients(lm.loss(ids, labels)), expected, strict=True):
        what = (
            f"the gradient of the loss for labels {labels.tolist()} with respect to {name} must be that of their mean"
        )
        trial.same(seen, right, f"{what} cross-entropy", lm, rerun, scale)


@check(
    "loss.all_ignored",
    title="with every label ignored, the loss and its gradient are finite",
    step="1.2",
    needs=("loss",),
    causes=("all-ignored-loss-nan",),
)
def all_ignored(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    loss = lm.loss(ids, torch.full_like(ids, IGNORED))
    if not bool(loss.isfinite()):
        message = (
            f"with every label ignored the loss must be finite, saw {loss.item()}: such a batch poisons the weights"
        )
        if trial.subject.missing("finite_loss"):  # torch's own mean gives NaN here, and much code leaves it at that
            raise NotApplicable(f"{message}; the subject does not claim 'finite_loss'")
        raise CheckFailure(message)
    if not loss.requires_grad:
        return
    parameters = [p for p in lm.module.parameters() if p.requires_grad]
    for grad in torch.autograd.grad(loss, parameters, allow_unused=True):
        if grad is not None and not bool(grad.isfinite().all()):
            raise CheckFailure("with every label ignored the loss must have a finite gradient, saw a NaN or infinity")
