"""Learning: the loss starts where it should, a small step lowers it, and a few steps learn one row by heart."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.dropout import dropout_of
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.jumps import jumps_move
from diymodel.verify.learning import (
    distinct_tokens,
    gradients_of,
    next_token_loss,
    trainable,
    training_undone,
)
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_VOCABULARY = 16  # tokens, so that the loss has far to fall
_STEPS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # predicted decreases of the loss, as shares of it
_OFF = 0.01  # of what a gradient predicts; one that is right is off by 1e-7, or 1e-3 where forward computes in float32
_OVERFIT_STEPS = 200
_QUICKLY = 40  # steps that are enough for most, at one rate or another, before any is followed to its end
_OVERFIT_RATES = (0.03, 0.01, 0.003)  # layers whose norms stand behind the sums may need a smaller one
_WIDE = 64  # hidden units and tokens: a scale that is wrong grows with the width
_NEAR = 0.5  # nats; logits from N(0, 1/3), as torch's own nn.Linear makes them, add 0.17


@check(
    "training.initial_loss",
    title="as constructed, the model takes all tokens to be about equally likely: the loss starts near ln V",
    step="1.2",
    needs=("small_init",),
    causes=("init-scale-wrong",),
)
def initial_loss(trial: Trial) -> None:
    size = {"hidden_size": _WIDE, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": _WIDE}
    config = trial.model(vocab_size=_WIDE, **size).config
    seed = trial.draw("init", st.integers(0, 2**16))
    torch.default_generator.manual_seed(seed)
    lm = trial.fresh(config)
    V = config.vocab_size
    ids = torch.randint(V, (8, 8), generator=torch.Generator().manual_seed(seed)).to(trial.device)
    loss, expected = next_token_loss(lm, ids).item(), math.log(V)
    if not abs(loss - expected) < _NEAR:
        raise CheckFailure(
            f"as constructed, the loss on random tokens must be near ln {V} = {expected:.3g}, saw {loss:.3g}"
        )


@check(
    "training.small_step_lowers_loss",
    title="a small step against the gradient lowers the loss by what the gradient predicts",
    step="2.2",
    needs=("graph",),
    causes=("gradient-wrong", "gradient-detached"),
)
def small_step_lowers_loss(trial: Trial) -> None:
    lm = trial.model()
    ids = distinct_tokens(trial, lm)
    loss = next_token_loss(lm, ids)
    parameters = trainable(lm)
    gradients = {name: g for name, g in gradients_of(loss, parameters).items() if g is not None}
    slope = sum(float(g.abs().square().sum()) for g in gradients.values())
    if slope == 0:
        raise CheckFailure(f"at a loss of {loss.item():.3g} the gradient must not be 0 everywhere")
    originals = {name: parameters[name].detach().clone() for name in gradients}

    def loss_after(step: float) -> float:
        for name, gradient in gradients.items():
            parameters[name].copy_(originals[name] - step / slope * gradient)
        return next_token_loss(lm, ids).item()

    with torch.no_grad():
        steps = [share * loss.item() for share in _STEPS]
        seen = [(loss_after(-step) - loss_after(step)) / (2 * step) for step in steps]
        share = _settled(seen)
        if share is None and max(seen) >= 0.5:
            return
        if jumps_move(lambda: next_token_loss(lm, ids), lambda: loss_after(0.0)):
            raise NotApplicable("forward rounds what it computes, and a gradient straight through that is no slope")
    if share is not None:
        raise CheckFailure(
            f"small steps along the gradient must change the loss of {loss.item():.6g} by what the gradient predicts, "
            f"saw {share:.4g} of it, the same for steps of several sizes"
        )
    change = seen[-1] * steps[-1]
    told = f"a {'fall' if change > 0 else 'rise'} of {abs(change):.2g}" if change else "none"
    raise CheckFailure(
        f"a step that should lower the loss of {loss.item():.6g} by {steps[-1]:.2g} must lower it by about that, "
        f"saw {told}; larger steps did no better"
    )


def _settled(shares: list[float]) -> float | None:
    """The share of the prediction that comes true, if it is not all, and three steps, each a tenth of the last, agree.

    Rounding is ten times as much for each next step, and never makes three agree; a loss that stays the same to the
    bit has been rounded away.
    """
    for three in zip(shares, shares[1:], shares[2:], strict=False):
        off = abs(three[-1] - 1)
        if 0 not in three and off > _OFF and max(three) - min(three) < off / 20:
            return three[-1]
    return None


@check(
    "training.overfits_a_tiny_batch",
    title=f"{_OVERFIT_STEPS} Adam steps on one short row bring its loss below a third",
    step="2.3",
    needs=("graph",),
    causes=("gradient-detached", "statistic-over-sequence", "parameters-unregistered"),
)
def overfits_a_tiny_batch(trial: Trial) -> None:
    size = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 16}
    lm = trial.model(max_sharpness=1, dropout=0.0, vocab_size=_VOCABULARY, **size)
    ids = distinct_tokens(trial, lm, 5)
    if dropout_of(lm.module) is None:  # else it has a dropout of its own, which only eval mode is without
        lm.module.train()
    first = next_token_loss(lm, ids).item()
    start = {name: parameter.detach().clone() for name, parameter in trainable(lm).items()}
    enough = first / 3
    for steps in (_QUICKLY, _OVERFIT_STEPS):
        last = []
        for rate in _OVERFIT_RATES:
            with torch.no_grad():
                for name, parameter in trainable(lm).items():
                    parameter.copy_(start[name])
            with training_undone(lm.module):
                last.append(_overfitted(lm, ids, rate, steps, enough))
            if last[-1] < enough:
                return
        if ids.shape[1] > 2:  # with time, a last bias learns how often each token comes, and no more
            enough = min(enough, math.log(ids.shape[1] - 1) / 2)
    raise CheckFailure(
        f"{_OVERFIT_STEPS} steps on {ids.tolist()} must bring the loss of {first:.3g} below {enough:.3g}, "
        f"saw {', '.join(f'{loss:.3g}' for loss in last)} at rates of {', '.join(map(str, _OVERFIT_RATES))}"
    )


def _overfitted(lm: LM, ids: Tensor, rate: float, steps: int, enough: float) -> float:
    """The loss after all Adam steps on one row, or the first one below ``enough``."""
    parameters = trainable(lm)
    mean = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    square = {name: torch.zeros_like(parameter.real) for name, parameter in parameters.items()}
    loss = next_token_loss(lm, ids)
    for step in range(1, steps + 1):
        found = gradients_of(loss, parameters)
        with torch.no_grad():  # Adam, by hand: torch's imports its compiler first, which takes longer than this
            for name, gradient in found.items():
                if gradient is not None:
                    mean[name].lerp_(gradient, 0.1)
                    square[name].lerp_(gradient.abs().square(), 0.05)
                    deviation = (square[name] / (1 - 0.95**step)).sqrt() + 1e-8
                    parameters[name].sub_(rate * mean[name] / (1 - 0.9**step) / deviation)
        loss = next_token_loss(lm, ids)
        if loss.item() < enough:
            break
    return loss.item()
