"""No position sees the future, and every position sees itself and its past."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure
from diymodel.verify.registry import check
from diymodel.verify.tolerance import rounding
from diymodel.verify.trial import Trial, draw_weights

_WEIGHTS = 4  # draws, before saying that something has no effect
_WIDE = {"hidden_size": 8, "num_heads": 1, "num_kv_heads": 1}  # a LayerNorm over two features only gives their order

_LEAKS = (
    "mask-sees-next-token",
    "bidirectional-mask",
    "mask-dropped-on-fast-path",
    "statistic-over-sequence",
    "softmax-wrong-axis",
    "mask-value-too-small",
)


def _edited(trial: Trial, lm: LM, ids: Tensor, position: int) -> Tensor:
    """The tokens with another one at ``position`` of every row."""
    shift = trial.draw("shift", st.integers(1, lm.config.vocab_size - 1))
    edited = ids.clone()
    edited[:, position] = (edited[:, position] + shift) % lm.config.vocab_size
    return edited


@check(
    "causality.edit",
    title="changing a token changes no earlier logit",
    step="1.1",
    causes=_LEAKS,
)
def edit(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    edited = _edited(trial, lm, ids, cut)
    what = f"changing the token at position {cut} must change no logit before it"
    trial.same(lm.logits(edited)[:, :cut], lm.logits(ids)[:, :cut], what, lm, lambda: lm.logits(ids)[:, :cut])


@check(
    "causality.truncation",
    title="cutting off later tokens changes no earlier logit",
    step="1.1",
    causes=(*_LEAKS, "ring-cache-overwritten"),
)
def truncation(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    what = f"the first {cut} tokens must give the same logits alone as with {ids.shape[1] - cut} more behind them"
    trial.same(lm.logits(ids[:, :cut]), lm.logits(ids)[:, :cut], what, lm, lambda: lm.logits(ids)[:, :cut])


@check(
    "causality.in_training",
    title="in training mode, with the same dropout, changing a token changes no earlier logit",
    step="3.3",
    causes=("mask-dropped-with-dropout", *_LEAKS),
)
def in_training(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    edited = _edited(trial, lm, ids, cut)
    lm.module.train()

    def run(tokens: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same dropout; the runner restores the global state
        return lm.logits(tokens)[:, :cut]

    what = f"in training mode, changing the token at position {cut} must change no logit before it"
    trial.same(run(edited), run(ids), what, lm, lambda: run(ids))


@check(
    "sensitivity.sees_itself_and_its_past",
    title="changing the first token changes the logits at its own and at the last position",
    step="1.1",
    causes=("mask-hides-self", "gradient-detached"),
)
def sees_itself_and_its_past(trial: Trial) -> None:
    lm = trial.model(**_WIDE)
    ids = trial.tokens(lm, min_length=2)
    edited = _edited(trial, lm, ids, 0)
    for position in (0, ids.shape[1] - 1):
        if not _differs_for_some_weights(trial, lm, ids, edited, position):
            raise CheckFailure(
                f"changing the first token must change the logits at position {position}, saw no change with any of "
                f"{_WEIGHTS} draws of the weights"
            )


@check(
    "sensitivity.order_matters",
    title="exchanging two earlier tokens changes the last logit",
    step="1.1",
    causes=("no-positions",),
)
def order_matters(trial: Trial) -> None:
    lm = trial.model(num_layers=1, **_WIDE)  # a second layer tells the order apart by what each position has seen
    a, b, c = trial.draw("three", st.permutations(range(lm.config.vocab_size)))[:3]
    ids = torch.tensor([[a, b, c]], device=trial.device)
    exchanged = torch.tensor([[b, a, c]], device=trial.device)
    if not _differs_for_some_weights(trial, lm, ids, exchanged, 2):
        raise CheckFailure(
            f"exchanging the first two of the tokens {[a, b, c]} must change the logits of the last, saw no change "
            f"with any of {_WEIGHTS} draws of the weights"
        )


def _differs_for_some_weights(trial: Trial, lm: LM, ids: Tensor, other: Tensor, position: int) -> bool:
    """Whether two inputs give logits at a position that are apart by more than rounding.

    One draw of the weights is not enough: attention can be so sure of one key that the others' weight is 0.
    """
    for i in range(_WEIGHTS):
        draw_weights(lm.module, trial.values["weights"] + i, sharpness=1)
        before, after = lm.logits(ids)[:, position], lm.logits(other)[:, position]
        if float((after - before).detach().abs().max()) > rounding(trial.dtype) * float(before.detach().abs().max()):
            return True
    return False
