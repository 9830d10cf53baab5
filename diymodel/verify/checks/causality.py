"""No position sees the future: by value, by gradient, on a cache, in training, and on every path attention can take."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.dropout import next_to_no_dropout
from diymodel.verify.failure import CheckFailure, NotApplicable, said
from diymodel.verify.learning import gradients_to, trained_call
from diymodel.verify.randomness import reseed
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

# Wide enough that no norm or dead unit cuts a gradient off, and more tokens than positions, so that a table with as
# many rows as there are tokens is the token embedding.
_TRAINABLE = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8, "vocab_size": 16}

LEAKS = (
    "bidirectional-mask",
    "mask-sees-next-token",
    "mask-dropped-on-fast-path",
    "statistic-over-sequence",
    "softmax-wrong-axis",
    "mask-value-too-small",
    "convolution-not-causal",
    "heads-mixed-by-reshape",
)
_CAPACITY = "expert-capacity-drops-tokens"


def edited(trial: Trial, lm: LM, ids: Tensor, position: int) -> Tensor:
    """The tokens with another one at ``position`` of every row."""
    shift = trial.draw("shift", st.integers(1, lm.config.vocab_size - 1))
    other = ids.clone()
    other[:, position] = (other[:, position] + shift) % lm.config.vocab_size
    return other


@check(
    "causality.edit",
    title="changing a token changes no earlier logit",
    step="1.1",
    needs=("causal",),
    causes=(*LEAKS, _CAPACITY),
)
def edit(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    other = edited(trial, lm, ids, cut)
    what = f"changing the token at position {cut} must change no logit before it"
    trial.same(lm.logits(other)[:, :cut], lm.logits(ids)[:, :cut], what, lm, lambda: lm.logits(ids)[:, :cut])


@check(
    "causality.truncation",
    title="cutting off later tokens changes no earlier logit",
    step="1.1",
    needs=("causal",),
    causes=(*LEAKS, "ring-cache-overwritten", _CAPACITY, "cached-path-diverges"),
)
def truncation(trial: Trial) -> None:
    lm = trial.model()
    must_not_need_what_follows(trial, lm, trial.tokens(lm, min_length=2))


def must_not_need_what_follows(trial: Trial, lm: LM, ids: Tensor) -> None:
    """Fail unless the logits stand as they are when what follows them is cut off somewhere."""
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    what = f"the first {cut} tokens must give the same logits alone as with {ids.shape[1] - cut} more behind them"
    trial.same(lm.logits(ids[:, :cut]), lm.logits(ids)[:, :cut], what, lm, lambda: lm.logits(ids)[:, :cut])


@check(
    "causality.in_training",
    title="in training mode, with the same dropout, changing a token changes no earlier logit",
    step="3.3",
    needs=("causal",),
    causes=("mask-dropped-with-dropout", *LEAKS, _CAPACITY),
)
def in_training(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))
    other = edited(trial, lm, ids, cut)
    lm.module.train()

    def run(tokens: Tensor) -> Tensor:
        reseed()  # the same dropout; the runner restores the global state
        return trained_call(lm, tokens)[:, :cut]

    what = f"in training mode, changing the token at position {cut} must change no logit before it"
    try:
        trial.same(run(other), run(ids), what, lm, lambda: run(ids))
    except CheckFailure:  # where experts drop out of what is sent to them, other tokens get other dropout
        with next_to_no_dropout(lm.module):
            trial.same(run(other), run(ids), what, lm, lambda: run(ids))


@check(
    "causality.without_gradients",
    title="logits are the same with and without gradients, and in inference mode",
    step="3.3",
    causes=("mask-dropped-on-fast-path", "attention-backends-disagree"),
)
def without_gradients(trial: Trial) -> None:
    # Faster code runs where nothing is recorded, such as nn.TransformerEncoder's, and brings masks of its own.
    lm = trial.model()
    ids = trial.tokens(lm)
    expected = lm.logits(ids)
    for name, mode in (("torch.no_grad()", torch.no_grad), ("torch.inference_mode()", torch.inference_mode)):
        with mode():
            seen = lm.logits(ids)
        trial.same(seen, expected, f"under {name} the logits must be those with gradients", lm, lambda: lm.logits(ids))


@check(
    "causality.through_cache",
    title="changing a token of a chunk on a cache changes no earlier logit of the chunk",
    step="3.2",
    needs=("causal", "cache", "chunks"),
    causes=("chunk-unmasked", *LEAKS, "ring-cache-overwritten", "expert-capacity-drops-tokens"),
)
def through_cache(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    prefill = trial.draw("prefill", st.integers(1, ids.shape[1] - 2))
    cut = trial.draw("cut", st.integers(prefill + 1, ids.shape[1] - 1))
    other = edited(trial, lm, ids, cut)

    def run(tokens: Tensor) -> Tensor:
        _, past = lm.extend(tokens[:, :prefill])
        logits, _ = lm.extend(tokens[:, prefill:], past)
        if logits.shape[1] != tokens.shape[1] - prefill:
            raise NotApplicable("a chunk on a cache does not give the logits of each of its positions")
        return logits[:, : cut - prefill]

    what = f"on a cache of {prefill}, changing the token at position {cut} must change no logit before it"
    trial.same(run(other), run(ids), what, lm, partial(run, ids))


@check(
    "causality.gradient",
    title="the logits before a position have no gradient to the embeddings from that position on",
    step="1.2",
    needs=("causal", "graph"),
    causes=(*LEAKS, "gradient-detached"),
)
def gradient(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, **_TRAINABLE)
    ids = trial.tokens(lm, min_length=2)
    if lm.convention.sequence_first:  # one row shows whether rows are looked up as (B, T) or as (T, B)
        ids = ids[:1]
    cut = trial.draw("cut", st.integers(1, ids.shape[1] - 1))

    def run() -> Tensor:
        found = _gradient_to_embeddings(lm, ids, cut)
        return found if found is not None else torch.zeros(*ids.shape, 1, device=trial.device)

    found = run()
    if not bool(found[:, :cut].any()):
        raise CheckFailure(f"the logits before position {cut} must depend on their own embeddings, saw gradient 0")
    expected = found.clone()
    expected[:, cut:] = 0
    what = f"the gradient of the logits before position {cut} to the embeddings from there on must be 0"
    trial.same(found, expected, what, lm, run)


def _gradient_to_embeddings(lm: LM, ids: Tensor, cut: int) -> Tensor | None:
    """Of a random sum of the logits before ``cut``, to what the embedding table gives each token; None: there is none.

    Raises:
        NotApplicable: the table does not give one row a token, or nothing can be differentiated.
    """
    looked_up: list[Tensor] = []

    def record(rows: Tensor) -> Tensor:
        looked_up.append(rows.detach().requires_grad_())
        return looked_up[-1].clone()  # which the module may write to

    with lm.embedding().giving(record), torch.enable_grad():
        logits = lm.logits(ids)[:, :cut]
    turned = lm.convention.sequence_first and len(looked_up) == 1 and looked_up[0].shape[:2] == ids.t().shape
    if len(looked_up) != 1 or not (turned or looked_up[0].shape[:2] == ids.shape):
        raise NotApplicable("the token embedding is not called once with all tokens")
    if not logits.requires_grad:
        return None
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    try:
        with torch.enable_grad():
            objective = (logits * weights).sum()
        (found,) = gradients_to(objective, looked_up)
    except RuntimeError as error:  # such as weights that forward has written to
        raise NotApplicable(f"the logits cannot be differentiated: {said(error)}") from error
    return found.transpose(0, 1) if turned and found is not None else found
