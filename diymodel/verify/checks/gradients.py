"""Gradients are finite and arrive nowhere else than they should; accumulation and checkpointing change none."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.checks.loss import labels_of_ids
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, said
from diymodel.verify.learning import (
    accumulated,
    backward,
    distinct_tokens,
    gradients_of,
    gradients_to,
    next_token_loss,
    same_gradients,
    trainable,
    training_undone,
)
from diymodel.verify.randomness import reseed
from diymodel.verify.registry import check
from diymodel.verify.tolerance import rounding
from diymodel.verify.trial import Trial

_VOCABULARY = 16  # more than there are positions, so that a table with as many rows is the token embedding
_CHECKPOINTING = (  # methods that turn it on; transformers deprecates its second name
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "enable_gradient_checkpointing",
    "set_gradient_checkpointing",
    "set_grad_checkpointing",
)


@check(
    "gradients.finite",
    title="every gradient is finite, with sharp weights, equal tokens and padding",
    step="1.2",
    needs=("graph",),
    causes=("masked-row-nan", "softmax-overflow-half"),
)
def finite(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    if trial.missing("padding") is None:
        real = trial.right_padding(ids)
        logits = lm.logits(ids, real)[real]
    else:
        logits = lm.logits(ids)
    for name, gradient in gradients_of(logits.logsumexp(-1).sum(), trainable(lm)).items():
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise CheckFailure(f"the gradient of finite logits must be finite, saw a NaN or infinity at {name}")


@check(
    "gradients.absent_tokens_zero",
    title="the embedding of a token that does not occur gets no gradient from the other tokens' logits",
    step="1.2",
    needs=("graph",),
    causes=("statistic-over-vocabulary",),
)
def absent_tokens_zero(trial: Trial) -> None:
    lm = trial.model(vocab_size=_VOCABULARY)
    ids = trial.tokens(lm, min_length=2)
    if bool((ids == ids[0, 0]).all()):  # of its logits nothing would be left beside what moves all alike
        ids[0, -1] = (ids[0, -1] + 1) % lm.config.vocab_size
        trial.values["tokens"] = ids.tolist()  # the report shows what was given
    table = lm.embedding()
    if not table.weight.requires_grad:
        raise NotApplicable("the token embedding is frozen")
    present = torch.tensor(sorted(set(ids.flatten().tolist())), device=trial.device)
    absent = [token for token in range(lm.config.vocab_size) if token not in set(present.tolist())]
    logits = lm.logits(ids)[..., present]  # a tied row has a right to its own logit
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    weights -= weights.mean(-1, keepdim=True)  # what log_softmax takes off all logits alike is a right of its as well
    (gradient,) = gradients_to((logits * weights).sum(), [table.weight])
    if gradient is None:
        return
    reached = (gradient[absent].abs() > rounding(trial.dtype) * gradient.abs().max()).any(1)
    if bool(reached.any()):
        token = absent[int(reached.nonzero()[0])]
        raise CheckFailure(
            f"token {token} does not occur in {ids.tolist()}: its embedding must get gradient 0 from the logits of "
            f"those that do, saw {float(gradient[token].abs().max()):.3g}"
        )


@check(
    "gradients.accumulate",
    title="the gradients of two backward passes add up to that of the sum",
    step="2.2",
    needs=("graph",),
    causes=("state-survives-calls", "gradient-cleared-in-forward"),
)
def accumulate(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    other = lm.twin()
    ids = distinct_tokens(trial, lm, 2)
    batches = (labels_of_ids(lm, ids), ids.flip(1))
    has_loss = trial.subject.missing("loss") is None and lm.loss(ids, ids.clone()).requires_grad

    def loss(of: LM, batch: Tensor) -> Tensor:
        return of.loss(batch, batch.clone()) if has_loss else next_token_loss(of, batch)

    what = "after backward passes over two batches, the gradient must be that of the sum of their losses"
    try:
        for batch in batches:
            loss(lm, batch).backward()  # type: ignore[no-untyped-call]
    except SubjectError:
        raise
    except Exception as error:  # torch says in several ways that a graph is used twice
        backward(loss(other, ids))  # raises where the first is at fault
        raise CheckFailure(f"{what}, saw {said(error)}") from error

    def objective() -> Tensor:
        return loss(other, batches[0]) + loss(other, batches[1])

    same_gradients(trial, accumulated(trainable(lm)), what, other, objective)


@check(
    "gradients.checkpointing",
    title="gradient checkpointing changes neither the loss nor any gradient",
    step="2.2",
    needs=("graph",),
    causes=("checkpointing-with-cache", "recompute-redraws-dropout", "state-survives-calls"),
)
def checkpointing(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    turn_on = _checkpointing_switch(lm.module)
    ids = distinct_tokens(trial, lm, 2)
    lm.module.train()
    other = lm.twin()
    try:
        turn_on()
    except Exception as error:  # a family may refuse it in a way of its own
        raise NotApplicable(f"gradient checkpointing is refused: {said(error)}") from error
    what = "with gradient checkpointing the gradient must be what it is without"
    try:
        reseed()  # the same dropout with and without
        loss = next_token_loss(lm, ids)
        loss.backward()  # type: ignore[no-untyped-call]
    except SubjectError:
        raise
    except Exception as error:  # torch says in several ways that a second run differed from the first
        backward(next_token_loss(other, ids))  # raises where it does without, too
        raise CheckFailure(f"{what}, saw {said(error)}") from error

    def objective() -> Tensor:
        reseed()
        with training_undone(other.module):
            return next_token_loss(other, ids)

    trial.same(loss, objective(), "with gradient checkpointing the loss must be what it is without", other, objective)
    same_gradients(trial, accumulated(trainable(lm)), what, other, objective)


def _checkpointing_switch(module: nn.Module) -> Callable[[], object]:
    method = next((getattr(module, name) for name in _CHECKPOINTING if hasattr(module, name)), None)
    if method is None:
        raise NotApplicable("the module has no gradient_checkpointing_enable()")
    asks = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in _parameters(method))
    return lambda: method(True) if asks else method()


def _parameters(method: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())
