"""Decoding with a cache is the same function as a forward pass over the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.counting import count_flops
from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.held import tensors_of, tensors_on
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_POSITIONS = (
    "position-restarts-in-decode",
    "position-advances-per-layer",
    "cached-keys-rotated-again",
    "position-from-kept-length",
    "rope-base-changes-mid-cache",
)
_BESIDE_THE_CACHE = (  # the whole sequence is wrong: it sees more than is kept, or runs otherwise, with gradients
    "window-off-by-one",
    "attention-backends-disagree",
)


@check(
    "decode.cached_equals_full",
    title="one token at a time on a cache gives the logits of the whole sequence",
    step="3.2",
    needs=("cache", "causal"),
    causes=(
        *_POSITIONS,
        "alibi-lost-in-decode",
        "chunk-mask-top-left",
        "window-ignored-in-decode",
        "cache-drops-oldest",
        "cache-object-replaced",
        "cache-rows-shared",
        "carried-state-lost",
        "cached-path-diverges",
        "bidirectional-mask",
        *_BESIDE_THE_CACHE,
        "expert-capacity-drops-tokens",
    ),
)
def cached_equals_full(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    prefill = trial.draw("prefill", st.integers(1, ids.shape[1] - 1))
    full = lm.logits(ids)
    logits, past = lm.extend(ids[:, :prefill])
    trial.same(logits[:, -1], full[:, prefill - 1], "prefill must give the uncached logits", lm, lambda: lm.logits(ids))
    for t in range(prefill, ids.shape[1]):
        logits, past = lm.extend(ids[:, t : t + 1], past)
        what = f"after a prefill of {prefill}, the cached step for position {t} must give the uncached logits"
        trial.same(logits[:, -1], full[:, t], what, lm, lambda: lm.logits(ids))


@check(
    "decode.chunks",
    title="several tokens at a time on a cache give the logits of the whole sequence",
    step="3.2",
    needs=("cache", "causal", "chunks"),
    causes=(
        "chunk-unmasked",
        "chunk-mask-top-left",
        *_POSITIONS,
        "chunk-size-changes-logits",
        "carried-state-lost",
        "ring-cache-overwritten",
        *_BESIDE_THE_CACHE,
    ),
)
def chunks(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    cuts = trial.draw("cuts", st.sets(st.integers(1, ids.shape[1] - 2), min_size=1).map(sorted))
    full = lm.logits(ids)
    past = None
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, past = lm.extend(ids[:, start:end], past)
        what = f"tokens {start} to {end - 1} on a cache of {start} must give the uncached logits"
        trial.same(logits[:, -1], full[:, end - 1], what, lm, lambda: lm.logits(ids))
        if logits.shape[1] == end - start:
            trial.same(logits, full[:, start:end], what, lm, lambda: lm.logits(ids))


@check(
    "decode.branch",
    title="two continuations of one cache do not disturb each other",
    step="3.2",
    needs=("cache", "cache_value"),
    causes=("cache-mutated-in-place", "cache-list-mutated", "state-survives-calls"),
)
def branch(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=3)
    stem, other = ids[:, :-2], (ids[:, -2:] + 1) % lm.config.vocab_size
    _, untouched = lm.extend(stem)
    expected, expected_past = lm.extend(ids[:, -2:-1], untouched)
    expected_last, _ = lm.extend(ids[:, -1:], expected_past)

    _, past = lm.extend(stem)
    first, one = lm.extend(ids[:, -2:-1], past)
    lm.extend(other[:, :1], past)
    last, _ = lm.extend(ids[:, -1:], one)  # before the next line, which would mend an overwritten slot
    again, _ = lm.extend(ids[:, -2:-1], past)

    def rerun() -> Tensor:
        """Both steps."""
        step, past = lm.extend(ids[:, -2:-1], lm.extend(stem)[1])
        return torch.cat((step, lm.extend(ids[:, -1:], past)[0]), 1)

    trial.same(first, expected, "two equal prefills must continue equally", lm, rerun)
    trial.same(again, expected, "continuing a cache a second time must give what it gave the first time", lm, rerun)
    trial.same(last, expected_last, "a branch must go on as if the other had not been taken", lm, rerun)


@check(
    "decode.unrelated_call",
    title="an unrelated call between prefill and decode changes nothing",
    step="3.2",
    needs=("cache", "uncached_again"),
    causes=("state-survives-calls",),
)
def unrelated_call(trial: Trial) -> None:
    lm = trial.model()
    if lm.convention.always_cached and lm.convention.one_timeline:
        raise NotApplicable("every call is on the one cache that the module keeps: a new sequence ends the last")
    ids = trial.tokens(lm, min_length=2)
    expected, _ = lm.extend(ids[:, -1:], lm.extend(ids[:, :-1])[1])
    _, past = lm.extend(ids[:, :-1])
    lm.logits(ids.flip(1))
    logits, _ = lm.extend(ids[:, -1:], past)
    what = "a decode step must give the same after an unrelated forward pass as without it"
    trial.same(logits, expected, what, lm, lambda: lm.extend(ids[:, -1:], lm.extend(ids[:, :-1])[1])[0])


@check(
    "decode.no_graph",
    title="the cache holds no autograd graph when gradients are off",
    step="3.2",
    needs=("cache",),
    causes=("cache-keeps-graph",),
)
def no_graph(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    learned = [tensor for tensor in tensors_on(lm.module) if tensor.requires_grad]  # kept beside the parameters
    with torch.no_grad():
        _, past = lm.extend(ids)
    for tensor in tensors_of(lm, past):
        if tensor.requires_grad and not any(tensor is known for known in learned):
            raise CheckFailure("a cache made under torch.no_grad() must hold plain tensors, saw one that requires grad")


@check(
    "decode.step_shape",
    title="a cached step of one token gives the logits of one position",
    step="3.2",
    needs=("cache",),
    causes=("cache-recomputes",),
)
def step_shape(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    logits, _ = lm.extend(ids[:, -1:], lm.extend(ids[:, :-1])[1])
    expected = (ids.shape[0], 1, lm.config.vocab_size)
    if tuple(logits.shape) != expected:
        raise CheckFailure(
            f"one token on a cache must give logits (batch, 1, vocab) {expected}, saw {tuple(logits.shape)}"
        )


@check(
    "decode.cost",
    title="a cached step costs little more on a long cache than on a short one",
    step="3.2",
    needs=("cache",),
    causes=("cache-recomputes",),
)
def cost(trial: Trial) -> None:
    # Wide enough that projections, the same at every length, outweigh attention, which grows with the cache: 31 cached
    # positions for 7 should cost a fifth more, and cost four times as much where the prefix is computed again.
    size: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
    lm = trial.model(length=32, **size)
    if lm.convention.block_mask:
        raise NotApplicable("torch counts no FLOPs in flex attention")
    if lm.config.max_seq_len < 32:
        raise NotApplicable(f"the module holds {lm.config.max_seq_len} positions, and growth shows over 32")
    ids = torch.arange(32, device=trial.device)[None] % lm.config.vocab_size
    short, long = (_step_flops(lm, ids[:, :length]) for length in (8, 32))
    if not short:
        raise NotApplicable("torch counts no FLOPs in this module's kernels")
    if long > 2 * short:
        raise CheckFailure(
            f"a cached step must not compute its prefix again: on 7 cached positions it took {short} FLOPs, on 31 it "
            f"must take at most twice as many, saw {long}"
        )


def _step_flops(lm: LM, ids: Tensor) -> int:
    """FLOPs of the cached step for the last token."""
    with torch.no_grad():
        _, past = lm.extend(ids[:, :-1])
    return count_flops(lambda: lm.extend(ids[:, -1:], past), lm.module).total
