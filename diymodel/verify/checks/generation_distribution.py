"""Drawn tokens follow softmax(logits / temperature), at the first step and, given the first token, at the second.

Shapes: B rows drawn, T prompt length, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.calling.generating import MANY
from diymodel.verify.checks.generation_sampling import ACCIDENT
from diymodel.verify.failure import CheckFailure, NotApplicable, crashed, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_CALLS = 4  # of MANY rows each
_ROUNDING = 1e-4  # what computing in float32 may move a probability by, and more


@check(
    "generation.follows_distribution",
    title="the tokens that generate draws follow softmax(logits / temperature)",
    step="3.1",
    needs=("sampling",),
    causes=("temperature-misapplied", "sampled-from-wrong-distribution", "generator-reseeded"),
)
@torch.no_grad()
def follows_distribution(trial: Trial) -> None:
    lm = trial.model(length=4)
    ids = trial.tokens(lm, max_length=2, rows=1)
    V = lm.config.vocab_size
    temperature = 1.0
    if "temperature" in lm.generating.names:
        temperature = trial.draw("temperature", st.sampled_from((1.0, 2.0, 0.5)))
    seed = trial.draw("seed", st.integers(0, 2**16))
    drawn = _draw(lm, ids, seed, temperature)
    where = f"after {ids[0].tolist()} at temperature {temperature}"
    if drawn.shape[1] != 2:
        raise CheckFailure(f"{where} generate must draw 2 tokens, saw {drawn.shape[1]}: see generation.keeps_prompt")
    first, second = drawn.unbind(1)
    if bool((drawn >= V).any()):
        raise CheckFailure(f"{where} generate must draw one of {V} tokens, saw {int(drawn.max())}")
    logits = lm.logits(ids)[0, -1]
    trial.varies(logits.mean().expand(V), logits)
    tests = V + V * V
    _must_follow(first, logits / temperature, tests, f"{where} the first token must be")
    longer = torch.cat((ids.expand(V, -1), torch.arange(V, device=ids.device)[:, None]), 1)
    after = torch.cat([lm.logits(rows)[:, -1] for rows in torch.split(longer, lm.generating.most_rows)])
    for token in sorted(set(first.tolist())):
        given = f"{where} and a first token {token}, the second must be"
        _must_follow(second[first == token], after[token] / temperature, tests, given)


def _draw(lm: LM, ids: Tensor, seed: int, temperature: float) -> Tensor:
    """Two new tokens in each of many equal rows, (B, 2)."""
    settings = {"temperature": temperature} if "temperature" in lm.generating.names else {}
    rows, T = ids.repeat(MANY, 1), ids.shape[1]
    try:
        return torch.cat([lm.sample(rows, 2, seed + call, **settings)[:, T:] for call in range(_CALLS)])
    except CheckFailure:
        raise
    except Exception as error:  # a stranger's generate may raise anything
        if temperature == 1 or crashed(error):
            raise
        raise NotApplicable(f"generate does not take temperature={temperature}: {said(error)}") from error


def _must_follow(drawn: Tensor, logits: Tensor, tests: int, what: str) -> None:
    """Fail where a token of V turned up so often or so rarely that no accident explains it.

    By Chernoff's bound n independent draws give a share s or one farther from the probability p with a chance of
    exp(-n KL(s, p)) at most; the chance that is let through is divided among all ``tests``, on two sides each.
    """
    n, V = len(drawn), len(logits)
    expected = logits.double().softmax(-1)
    share = drawn.bincount(minlength=V).double() / n
    nearest = share.clamp(expected - _ROUNDING, expected + _ROUNDING).clamp(0, 1)
    divergence = _kl(share, nearest) + _kl(1 - share, 1 - nearest)
    if float(n * divergence.max()) > math.log(2 * tests / ACCIDENT):
        token = int(divergence.argmax())
        raise CheckFailure(
            f"{what} {token} with probability {float(expected[token]):.3g}, saw it in {int(share[token] * n + 0.5)} of "
            f"{n} draws"
        )


def _kl(share: Tensor, probability: Tensor) -> Tensor:
    return torch.where(share > 0, share * (share / probability).log(), 0.0)
