"""The module's own loss: next-token cross-entropy, averaged over the scored labels."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.convention import IGNORED
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal
from diymodel.verify.learning import gradients_to
from diymodel.verify.registry import check
from diymodel.verify.strategies import chunk_sizes
from diymodel.verify.trial import Trial

CAUSES = (
    "labels-not-shifted",
    "labels-shifted-twice",
    "labels-flattened-before-shift",
    "ignore-index-not-honoured",
    "loss-wrong-denominator",
)


def labels_of_ids(lm: LM, ids: Tensor) -> Tensor:
    """The ids as labels, all scored: where they hold the token that the module ignores, it is replaced in both."""
    ids[ids == lm.convention.ignore_index] = (lm.convention.ignore_index + 1) % lm.config.vocab_size
    return ids.clone()


def draw_labels(trial: Trial, lm: LM, ids: Tensor) -> Tensor:
    """Labels (B, T) that differ from the tokens, if such may be given: one, some or all are live."""
    if trial.subject.missing("labels") is not None:
        return labels_of_ids(lm, ids)
    B, T = ids.shape
    places = [[row, position] for row in range(B) for position in range(1, T)]
    one, some = (st.lists(st.sampled_from(places), min_size=1, max_size=size) for size in (1, B * T))
    live = trial.draw("live", st.one_of(one, some, st.just(places)))
    shift = trial.draw("label_shift", st.integers(0, int(ids.max()) or 1))
    labels = torch.full_like(ids, IGNORED)
    for row, position in live:
        labels[row, position] = (ids[row, position] + shift) % (int(ids.max()) + 1)
    if not trial.draw("first_ignored", st.booleans()):  # no position predicts it
        labels[:, 0] = ids[:, 0]
    return labels


def scored(labels: Tensor) -> int:
    """How many labels are scored: all that are live, but those of first positions, which nothing predicts."""
    return int((labels[:, 1:] != IGNORED).sum())


def coarse(loss: Tensor, logits: Tensor) -> Tensor:
    """A loss, and the logits as coarse as it, for measuring their rounding: many modules take it in float32."""
    return torch.cat((loss.reshape(1), logits.to(loss.dtype).flatten()))


def oracle(lm: LM, ids: Tensor, labels: Tensor) -> Tensor:
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
    causes=(*CAUSES, "loss-low-precision"),
)
def value(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    labels = draw_labels(trial, lm, ids)
    loss = lm.loss(ids, labels)

    def rerun() -> Tensor:
        return coarse(lm.loss(ids, labels), lm.logits(ids))

    what = f"the loss for labels {labels.tolist()} must be their mean cross-entropy"
    trial.same(loss, oracle(lm, ids, labels), what, lm, rerun, scale=lm.logits(ids))


@check(
    "loss.pad_token_scored",
    title="a label that equals the padding token is scored like any other",
    step="1.2",
    needs=("loss",),
    causes=("pad-equals-eos-masked", *CAUSES),
)
def pad_token_scored(trial: Trial) -> None:
    padding = trial.draw("padding", st.integers(0, 2))
    lm = trial.model(pad_token_id=padding)
    if lm.convention.ignore_index >= 0:
        raise NotApplicable(f"the module ignores labels of {lm.convention.ignore_index}, which is a token")
    ids = trial.tokens(lm, min_length=2)
    labels = draw_labels(trial, lm, ids)
    row, position = (labels[:, 1:] != IGNORED).nonzero()[0].tolist()
    ids[row, position + 1] = labels[row, position + 1] = padding  # as where text ends with the token that also fills up

    def rerun() -> Tensor:
        return coarse(lm.loss(ids, labels), lm.logits(ids))

    what = (
        f"with pad_token_id={padding}, the loss for labels {labels.tolist()} must be their mean cross-entropy, that of "
        f"label {padding} included"
    )
    trial.same(lm.loss(ids, labels), oracle(lm, ids, labels), what, lm, rerun, scale=lm.logits(ids))


@check(
    "loss.micro_batches_add_up",
    title="the losses of micro-batches, weighted by their labels, add up to the loss of the whole batch",
    step="2.2",
    needs=("loss",),
    causes=("accumulation-mean-of-means", "loss-wrong-denominator", "statistic-over-batch", "state-survives-calls"),
)
def micro_batches_add_up(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2, rows=trial.draw("batch", st.integers(2, 4)))
    labels = draw_labels(trial, lm, ids)
    sizes = trial.draw("sizes", chunk_sizes(ids.shape[0]))
    whole = lm.loss(ids, labels)
    parts = torch.split(labels, sizes)
    counts = [scored(part) for part in parts]
    total = torch.zeros_like(whole)
    for part_ids, part, count in zip(torch.split(ids, sizes), parts, counts, strict=True):
        if count or trial.subject.missing("finite_loss") is None:
            total = total + count * lm.loss(part_ids, part)

    def rerun() -> Tensor:
        return coarse(lm.loss(ids, labels), lm.logits(ids))

    what = f"micro-batches with {counts} labels must add up to the loss of the whole batch, label for label"
    trial.same(total / sum(counts), whole, what, lm, rerun, scale=lm.logits(ids))


@check(
    "loss.labels_unchanged",
    title="the labels and the token ids that the loss is computed from are not written to",
    step="1.2",
    needs=("loss",),
    causes=("inputs-written-in-place",),
)
def labels_unchanged(trial: Trial) -> None:
    lm = trial.model(pad_token_id=0)
    ids = trial.tokens(lm, min_length=1 if trial.subject.missing("labels") is None else 2)
    labels = lm.own_labels(draw_labels(trial, lm, ids) if ids.shape[1] > 1 else ids)
    before = ids.clone(), labels.clone()
    lm.own_loss(ids, labels)
    if trial.missing("padding") is None:  # where labels at the padding may be put out of the way
        refusal(lm.own_loss, ids, labels, trial.right_padding(ids))
    for name, seen, expected in zip(("input_ids", "labels"), (ids, labels), before, strict=True):
        if not torch.equal(seen, expected):
            raise CheckFailure(f"{name} must stay {expected.tolist()}, saw {seen.tolist()} after the loss was computed")


@check(
    "loss.gradient",
    title="the gradient of the loss is that of the mean next-token cross-entropy",
    step="1.2",
    needs=("loss", "graph"),
    causes=("gradient-detached", *CAUSES, "loss-low-precision"),
)
def gradient(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    ids = trial.tokens(lm, min_length=2)
    labels = draw_labels(trial, lm, ids)
    named = {name: p for name, p in lm.module.named_parameters() if p.requires_grad}

    def gradients(loss: Tensor) -> list[Tensor]:
        found = gradients_to(loss, list(named.values()))
        return [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)]

    def rerun() -> Tensor:
        with torch.enable_grad():
            return torch.cat([g.flatten() for g in gradients(lm.loss(ids, labels))])

    expected = gradients(oracle(lm, ids, labels))
    scale = torch.stack([g.abs().max() for g in expected if g.numel()])
    loss = lm.loss(ids, labels)
    if not loss.requires_grad:
        raise CheckFailure("the loss must carry a gradient, saw none, and the logits carry one")
    for name, seen, right in zip(named, gradients(loss), expected, strict=True):
        what = (
            f"the gradient of the loss for labels {labels.tolist()} with respect to {name} must be that of their mean"
        )
        trial.same(seen, right, f"{what} cross-entropy", lm, rerun, scale)


@check(
    "loss.all_ignored",
    title="with every label ignored, the loss and its gradient are finite",
    step="1.2",
    needs=("loss", "labels"),
    causes=("all-ignored-loss-nan",),
)
def all_ignored(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    labels = torch.full_like(ids, IGNORED)
    if trial.draw("label_of_first", st.booleans()):  # no position predicts it
        labels[:, 0] = ids[:, 0]
    loss = lm.loss(ids, labels)
    if not bool(loss.isfinite()):
        message = (
            f"with every label ignored the loss must be finite, saw {loss.item()}: such a batch poisons the weights"
        )
        if trial.subject.missing("finite_loss"):  # torch's own mean gives NaN here, and much code leaves it at that
            raise NotApplicable(f"{message}; the subject does not claim 'finite_loss'")
        raise CheckFailure(message)
    if not loss.requires_grad or trial.subject.missing("graph"):
        return
    parameters = [p for p in lm.module.parameters() if p.requires_grad]
    for grad in gradients_to(loss, parameters):
        if grad is not None and not bool(grad.isfinite().all()):
            raise CheckFailure("with every label ignored the loss must have a finite gradient, saw a NaN or infinity")
