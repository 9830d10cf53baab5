"""Gradients arrive where they should, nowhere else, and going against them learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_WIDE_ENOUGH = 8  # inside the MLP: a single ReLU may well be off at every token
_VOCABULARY = 16  # more than there are positions, so that a table with as many rows is the token embedding
_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)  # predicted decreases of the loss, as shares of it
_OVERFIT_STEPS = 40
_OVERFIT_RATE = 0.03


def _distinct(trial: Trial, lm: LM, min_length: int = 3, max_length: int = 6) -> Tensor:
    """One row without repetition (1, T): over equal tokens, attention averages equal values and has no gradient."""
    length = trial.draw("length", st.integers(min_length, max_length))
    row = st.permutations(range(lm.config.vocab_size)).map(lambda tokens: tokens[:length])
    return torch.tensor([trial.draw("tokens", row)], device=trial.device)


def _trainable(lm: LM) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in lm.module.named_parameters() if parameter.requires_grad}


def _next_token_loss(lm: LM, ids: Tensor) -> Tensor:
    """Cross-entropy from the logits, so that a subject without a loss has one."""
    return F.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _gradients(objective: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    if not parameters:
        raise CheckFailure("the module must have parameters to train, saw none with requires_grad")
    if not objective.requires_grad:
        raise CheckFailure("the logits must carry a gradient, saw none: no parameter could learn")
    return dict(
        zip(parameters, torch.autograd.grad(objective, list(parameters.values()), allow_unused=True), strict=True)
    )


@check(
    "gradients.reach_every_parameter",
    title="every parameter gets a gradient from the logits",
    step="1.2",
    causes=("gradient-detached", "parameters-unregistered"),
)
def reach_every_parameter(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, intermediate_size=_WIDE_ENOUGH)
    ids = _distinct(trial, lm)
    unreached = set(_trainable(lm))
    for seed in range(3):  # what is 0 by bad luck in one draw is not in three
        lm = trial.build(lm.config, trial.values["weights"] + seed, 1)
        logits = lm.logits(ids)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
        found = _gradients((logits * weights).sum(), _trainable(lm))
        unreached -= {name for name, gradient in found.items() if gradient is not None and bool(gradient.any())}
    if unreached:
        raise CheckFailure(
            f"every parameter must get a gradient from the logits, saw none at {', '.join(sorted(unreached))}"
        )


@check(
    "gradients.finite",
    title="every gradient is finite, with sharp weights, equal tokens and padding",
    step="1.2",
    causes=("masked-row-nan", "softmax-overflow-half"),
)
def finite(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    if trial.subject.missing("padding") is None:
        real = trial.right_padding(ids)
        logits = lm.logits(ids, real)[real]
    else:
        logits = lm.logits(ids)
    for name, gradient in _gradients(logits.logsumexp(-1).sum(), _trainable(lm)).items():
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise CheckFailure(f"the gradient of finite logits must be finite, saw a NaN or infinity at {name}")


@check(
    "gradients.absent_tokens_zero",
    title="the embedding of a token that does not occur gets no gradient from the other tokens' logits",
    step="1.2",
    causes=("statistic-over-vocabulary",),
)
def absent_tokens_zero(trial: Trial) -> None:
    lm = trial.model(vocab_size=_VOCABULARY)
    ids = trial.tokens(lm)
    table = lm.embedding()
    present = torch.tensor(sorted(set(ids.flatten().tolist())), device=trial.device)
    absent = [token for token in range(_VOCABULARY) if token not in set(present.tolist())]
    logits = lm.logits(ids)[..., present]  # a tied row has a right to its own logit
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), table.weight, allow_unused=True)
    if gradient is not None and bool(gradient[absent].any()):
        token = absent[int(gradient[absent].any(1).nonzero()[0])]
        raise CheckFailure(
            f"token {token} does not occur in {ids.tolist()}: its embedding must get gradient 0 from the logits of "
            f"those that do, saw {float(gradient[token].abs().max()):.3g}"
        )


@check(
    "training.small_step_lowers_loss",
    title="a small step against the gradient lowers the loss by what the gradient predicts",
    step="2.2",
    causes=("gradient-wrong", "gradient-detached"),
)
def small_step_lowers_loss(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    ids = _distinct(trial, lm)
    loss = _next_token_loss(lm, ids)
    parameters = _trainable(lm)
    gradients = {name: g for name, g in _gradients(loss, parameters).items() if g is not None}
    slope = sum(float(g.pow(2).sum()) for g in gradients.values())
    if slope == 0:
        raise CheckFailure(f"at a loss of {loss.item():.3g} the gradient must not be 0 everywhere")
    originals = {name: parameters[name].detach().clone() for name in gradients}
    seen = []
    with torch.no_grad():
        for share in _STEPS:
            predicted = share * loss.item()
            for name, gradient in gradients.items():
                parameters[name].copy_(originals[name] - predicted / slope * gradient)
            seen.append((loss - _next_token_loss(lm, ids)).item() / predicted)
    if max(seen) < 0.5:
        raise CheckFailure(
            f"a step that should lower the loss of {loss.item():.6g} by {predicted:.2g} must lower it by about that, "
            f"saw it fall by {seen[-1] * predicted:.2g}; larger steps did no better"
        )


@check(
    "training.overfits_a_tiny_batch",
    title=f"{_OVERFIT_STEPS} Adam steps on one short row bring its loss below a third",
    step="2.3",
    causes=("gradient-detached", "statistic-over-sequence", "parameters-unregistered"),
)
def overfits_a_tiny_batch(trial: Trial) -> None:
    size = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 16}
    lm = trial.model(max_sharpness=1, dropout=0.0, vocab_size=_VOCABULARY, **size)
    ids = _distinct(trial, lm, 5)
    lm.module.train()
    parameters = _trainable(lm)
    mean = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    square = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    first = _next_token_loss(lm, ids).item()
    for step in range(1, _OVERFIT_STEPS + 1):
        found = _gradients(_next_token_loss(lm, ids), parameters)
        with torch.no_grad():  # Adam, by hand: torch's imports its compiler first, which takes longer than this
            for name, gradient in found.items():
                if gradient is not None:
                    mean[name].lerp_(gradient, 0.1)
                    square[name].lerp_(gradient.square(), 0.05)
                    deviation = (square[name] / (1 - 0.95**step)).sqrt() + 1e-8
                    parameters[name].sub_(_OVERFIT_RATE * mean[name] / (1 - 0.9**step) / deviation)
            last = _next_token_loss(lm, ids).item()
        if last < first / 3:
            return
    raise CheckFailure(
        f"{_OVERFIT_STEPS} steps on {ids.tolist()} must bring the loss of {first:.3g} below {first / 3:.3g}, "
        f"saw {last:.3g}"
    )
