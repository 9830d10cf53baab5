"""Drawing tokens: what the seed decides, what rows share, and the edges of temperature, top_k and top_p.

Judged on many equal rows at once, and only where an accident is next to impossible.

Shapes: B batch, T prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.calling.generating import MANY
from diymodel.verify.checks.generation import must_be_likeliest
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

ACCIDENT = 1e-12  # chance of a false alarm that is let through
_MOST = 4  # tokens that a top_p leaves
_CERTAIN = 0.12  # what is so likely, or more, is drawn in some of MANY rows


def _model_and_prompt(trial: Trial) -> tuple[LM, Tensor]:
    """A model whose draws are not all but certain, and one row (1, T)."""
    lm = trial.model(length=4, max_sharpness=1)
    return lm, trial.tokens(lm, max_length=2, rows=1)


def _probabilities(lm: LM, ids: Tensor) -> Tensor:
    """Of the first new token, (V,)."""
    return lm.logits(ids)[0, -1].detach().double().softmax(-1)


def _accepted(call: Callable[[], Tensor], plain: Callable[[], object], what: str) -> Tensor:
    """What a call gives that must be accepted; where ``plain`` raises as well, what it asks for is not at fault."""
    try:
        return call()
    except Exception as error:  # a stranger's generate may raise anything
        plain()
        raise CheckFailure(f"{what} must be accepted, saw {said(error)}") from error


def _seed(trial: Trial) -> int:
    return trial.draw("seed", st.integers(0, 2**16))


@check(
    "generation.seed_repeats",
    title="the same seed draws the same tokens, another seed draws others",
    step="3.1",
    needs=("sampling",),
    causes=("seed-ignored", "state-survives-calls", "temperature-misapplied", "inputs-written-in-place"),
)
def seed_repeats(trial: Trial) -> None:
    lm, ids = _model_and_prompt(trial)
    probabilities, seed = _probabilities(lm, ids), _seed(trial)
    rows = ids.repeat(MANY, 1)
    first = lm.sample(rows, 2, seed)
    torch.rand(3)  # an own seed is not disturbed by other draws
    again = lm.sample(rows, 2, seed)
    if not torch.equal(first, again):
        row = int((first != again).any(1).nonzero()[0])
        raise CheckFailure(
            f"seed {seed} must draw the same tokens each time: first {first[row].tolist()} in row {row}, "
            f"saw {again[row].tolist()} the second time"
        )
    if float(probabilities.pow(2).sum()) ** MANY > ACCIDENT:
        raise NotApplicable("one token is so likely that two seeds may well draw the same")
    if torch.equal(first, lm.sample(rows, 2, seed + 1)):
        raise CheckFailure(
            f"seeds {seed} and {seed + 1} must draw different tokens in {MANY} rows, saw the same in every row"
        )


@check(
    "generation.rows_draw_independently",
    title="equal rows of a batch draw independently of each other",
    step="3.1",
    needs=("sampling",),
    causes=("samples-share-first-token", "cache-rows-shared"),
)
def rows_draw_independently(trial: Trial) -> None:
    lm, ids = _model_and_prompt(trial)
    probabilities = _probabilities(lm, ids)
    if float(probabilities.pow(MANY).sum()) > ACCIDENT:
        raise NotApplicable("one token is so likely that all rows may well draw it")
    first = lm.sample(ids.repeat(MANY, 1), 1, _seed(trial))[:, ids.shape[1]]
    if bool((first == first[0]).all()):
        raise CheckFailure(
            f"{MANY} equal rows must draw independently: the likeliest token has probability "
            f"{float(probabilities.max()):.3g}, saw token {int(first[0])} first in every row"
        )


@check(
    "generation.temperature_zero",
    title="temperature 0 takes the likeliest token",
    step="3.1",
    needs=("temperature_zero",),
    causes=("temperature-zero",),
)
def temperature_zero(trial: Trial) -> None:
    lm, ids = _model_and_prompt(trial)
    rows = ids if trial.subject.missing("sampling") else ids.repeat(lm.generating.most_rows, 1)  # some take one only
    seed = _seed(trial)
    # With a setting that excludes nothing as well: some take it for a wish to sample. One that is refused at any
    # temperature is another check's matter.
    off: dict[str, Any] = {"top_k": lm.config.vocab_size, "top_p": 1.0}
    known = [name for name in off if not trial.subject.missing(name)]
    taken = [name for name in known if refusal(lambda: lm.sample(rows, 2, seed, **{name: off[name]})) is None]  # noqa: B023
    beside = trial.draw("beside", st.sampled_from(["", *taken]))
    settings = {beside: off[beside]} if beside else {}
    what = "temperature=0" + "".join(f" with {name}={value}" for name, value in settings.items())
    found = _accepted(
        lambda: lm.sample(rows, 2, seed, temperature=0.0, **settings), lambda: lm.generate(rows, 2, seed=seed), what
    )
    must_be_likeliest(trial, lm, rows, found[:, ids.shape[1] :], f"{what} must take the likeliest token")


@check(
    "generation.top_k",
    title="top_k draws among the k likeliest tokens, and among all where k is the vocabulary or more",
    step="3.1",
    needs=("sampling", "top_k"),
    causes=("top-k-edge",),
)
def top_k(trial: Trial) -> None:
    lm, ids = _model_and_prompt(trial)
    vocab_size = lm.config.vocab_size
    k = trial.draw("top_k", st.integers(1, vocab_size + 3))
    what = f"top_k={k} of {vocab_size} tokens"
    rows, seed = ids.repeat(MANY, 1), _seed(trial)
    try:
        first = lm.sample(rows, 1, seed, top_k=k)[:, ids.shape[1]]
    except Exception as error:  # a stranger's generate may raise anything
        if k > vocab_size and isinstance(error, ValueError):
            raise NotApplicable(f"a top_k above the vocabulary is refused: {said(error)}") from error
        lm.sample(rows, 1, seed)  # which raises by itself where top_k is not at fault
        raise CheckFailure(f"{what} must be accepted, saw {said(error)}") from error
    _must_be_among(first, _probabilities(lm, ids), min(k, vocab_size), what)


def _must_be_among(first: Tensor, probabilities: Tensor, count: int, what: str) -> None:
    """Fail unless all tokens drawn are among so many likeliest, and none of these is missing but by chance."""
    kept, best = probabilities.topk(count)
    allowed = probabilities >= kept[-1] * (1 - 1e-6)  # a near tie may go either way
    drawn = first.bincount(minlength=len(probabilities)) > 0
    if bool((drawn & ~allowed).any()):
        raise CheckFailure(f"{what} must draw among {best.tolist()}, saw {sorted(set(first.tolist()))}")
    certain = torch.zeros_like(allowed).scatter(0, best, (1 - kept / kept.sum()) ** MANY < ACCIDENT)
    if bool((certain & ~drawn).any()):
        token = int((certain & ~drawn).nonzero()[0])
        raise CheckFailure(
            f"{what} must leave token {token} with a probability of {float(probabilities[token] / kept.sum()):.3g}, "
            f"saw it in none of {MANY} rows, which drew {sorted(set(first.tolist()))}"
        )


@check(
    "generation.top_p",
    title="top_p leaves the fewest tokens that together reach it; a tiny one the likeliest, in bfloat16 as well",
    step="3.1",
    needs=("sampling", "top_p"),
    causes=("top-p-edge",),
)
def top_p(trial: Trial) -> None:
    lm, ids = _model_and_prompt(trial)
    probabilities = _probabilities(lm, ids)
    ranked = probabilities.sort(descending=True).values
    most = max(1, int((ranked > _CERTAIN).sum()))
    if (count := min(trial.draw("count", st.integers(1, _MOST)), most)) > 1:
        reached = ranked.cumsum(0)
        between = float(reached[count - 2 : count].mean())
        drawn = lm.sample(ids.repeat(MANY, 1), 1, _seed(trial), top_p=between)[:, ids.shape[1]]
        _must_be_among(drawn, probabilities, count, f"top_p={between:.3g}, which {count} tokens reach,")
    p = trial.draw("top_p", st.sampled_from((1e-3, 1e-6, 1e-12, 1e-20)))  # below any likeliest token's probability
    rows, seed = ids.repeat(lm.generating.most_rows, 1), _seed(trial)
    what = f"top_p={p}"
    if trial.draw("bfloat16", st.booleans()):
        lm = lm.twin()
        lm.module.bfloat16()
        what += " in bfloat16"
        try:
            lm.sample(rows, 1, seed)
        except Exception as error:  # kernels and modules refuse narrow types in ways of their own
            raise NotApplicable(f"the module does not generate in bfloat16: {said(error)}") from error
    found = _accepted(lambda: lm.sample(rows, 1, seed, top_p=p), lambda: lm.sample(rows, 1, seed), what)
    must_be_likeliest(trial, lm, rows, found[:, ids.shape[1] :], f"{what} must leave the likeliest token alone")
