"""Generation takes the likeliest token of the model's own logits, for as long as it is asked to, row by row.

Whole generated sequences are never compared between two ways of computing them: at a near tie both are right, and from
there on they differ. What is judged is each new token, on the logits of what really stands before it.

Shapes: B batch, T prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, told_apart
from diymodel.verify.registry import check
from diymodel.verify.tolerance import BEYOND_ROUNDING, estimate_noise, noise_factor, rounding
from diymodel.verify.trial import Trial

LONGEST = 3  # tokens of a prompt


def draw_prompt(trial: Trial, lm: LM) -> Tensor:
    """Token ids (B, T), B as many as generate takes."""
    return trial.tokens(lm, 1, LONGEST, rows=1 if lm.generating.one_row else None)


def draw_number(trial: Trial, lm: LM, ids: Tensor) -> int:
    """How many new tokens to ask for: as many as fit, at most."""
    return trial.draw("new_tokens", st.integers(1, lm.config.max_seq_len - ids.shape[1]))


@torch.no_grad()
def must_be_likeliest(
    trial: Trial,
    lm: LM,
    prompt: Tensor,
    new: Tensor,
    what: str,
    rivals: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Fail unless each of the ``new`` tokens (B, N) is the likeliest after all that stands before it.

    Args:
        what: the property, as "… must …".
        rivals: of prompt and new tokens (B, T + N), which tokens (B, N, V) it is compared with; None: all.
    """
    whole = torch.cat((prompt, new), 1)
    if bool((whole >= lm.config.vocab_size).any()):
        raise CheckFailure(f"{what}, one of {lm.config.vocab_size}, saw the tokens {new.tolist()}")
    logits = lm.logits(whole[:, :-1])[:, prompt.shape[1] - 1 :]
    compared = logits if rivals is None else logits.masked_fill(~rivals(whole), -torch.inf)
    best, chosen = compared.amax(-1), logits.gather(-1, new[..., None])[..., 0]
    trial.varies(logits.amax(-1), logits.amin(-1))
    # Both logits carry rounding, and most generators choose in float32.
    dtype, largest = logits.dtype, float(logits.abs().max())
    tolerance = 2 * max(rounding(dtype), rounding(torch.float32)) * largest
    behind = (best - chosen).double().nan_to_num(torch.inf)
    worst = float(behind.max())
    if tolerance < worst and (worst <= BEYOND_ROUNDING * largest or dtype != torch.float64):
        noise = estimate_noise(lm.module, lambda: lm.logits(whole[:, :-1]), trial.values["weights"])
        tolerance = max(tolerance, 2 * noise_factor(dtype) * noise)
    if worst > tolerance:
        row, step = (int(i) for i in (behind > tolerance).nonzero()[0])
        where = f"new token {step} of row {row}" if len(new) > 1 else f"new token {step}"
        apart, explained = told_apart(worst, tolerance)
        raise CheckFailure(
            f"{what}: after {whole[row, : prompt.shape[1] + step].tolist()} that is "
            f"{int(compared[row, step].argmax())} with logit {float(best[row, step]):.9g}, saw "
            f"{int(new[row, step])} with {float(chosen[row, step]):.9g} as {where}; "
            f"the largest difference is {apart}, rounding explains {explained}",
            worst,
            tolerance,
        )


@check(
    "generation.keeps_prompt",
    title="generate returns the prompt as it was, then as many new tokens as it was asked for",
    step="3.1",
    needs=("generate",),
    causes=("generated-length-wrong", "prompt-not-kept", "inputs-written-in-place"),
)
def keeps_prompt(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    most = lm.config.max_seq_len - ids.shape[1]
    new_tokens = trial.draw(
        "new_tokens", st.integers(1, most) | st.just(most)
    )  # the last position is the likeliest miss
    found = lm.generate(ids, new_tokens)
    T = ids.shape[1]
    if tuple(found.shape) != (ids.shape[0], T + new_tokens):
        raise CheckFailure(
            f"{T} prompt tokens and {new_tokens} new ones of {ids.shape[0]} rows must come back as "
            f"{(ids.shape[0], T + new_tokens)} token ids, saw {tuple(found.shape)}"
        )
    if not torch.equal(found[:, :T], ids):
        raise CheckFailure(f"what generate returns must begin with {ids.tolist()}, saw {found[:, :T].tolist()}")


@check(
    "generation.greedy_is_argmax",
    title="greedy generation takes the likeliest token at every step",
    step="3.1",
    needs=("greedy",),
    causes=(
        "cached-path-diverges",
        "state-survives-calls",
        "temperature-zero",
        "top-k-edge",
        "padded-vocabulary-sampled",
    ),
)
def greedy_is_argmax(trial: Trial) -> None:
    _greedy_is_argmax(trial, use_cache=False)


@check(
    "generation.cached_greedy_is_argmax",
    title="with a cache, greedy generation takes the likeliest token at every step as well",
    step="3.2",
    needs=("greedy", "generate_cache"),
    causes=(
        "position-restarts-in-decode",
        "cached-path-diverges",
        "position-advances-per-layer",
        "cache-rows-shared",
        "cache-argument-swallowed",
    ),
)
def cached_greedy_is_argmax(trial: Trial) -> None:
    _greedy_is_argmax(trial, use_cache=True)


def _greedy_is_argmax(trial: Trial, use_cache: bool) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    settings: dict[str, Any] = {"use_cache": use_cache} if "use_cache" in lm.generating.names else {}
    found = lm.greedy(ids, draw_number(trial, lm, ids), **settings)
    how = f" with use_cache={use_cache}" if settings else ""
    what = f"greedy generation{how} must take the likeliest token"
    must_be_likeliest(trial, lm, ids, found[:, ids.shape[1] :], what)


@check(
    "generation.padded_prompt",
    title="a padded prompt continues from its last real token, as it does alone",
    step="5.1",
    needs=("greedy", "generate_batch", "generate_padded"),
    causes=(
        "continues-from-pad",
        "padding-mask-ignored",
        "padding-mask-lost-in-decode",
        "padded-batch-shared-position",
        "position-ids-ignored",
    ),
)
def padded_prompt(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, 2, LONGEST, rows=trial.draw("batch", st.integers(2, 3)))
    new_tokens = draw_number(trial, lm, ids)
    real = trial.right_padding(ids, lm.convention.shortest)
    left = lm.generating.pads_left or "left_padding" in trial.subject.claims
    real = real.flip(1) if left else real
    found = lm.greedy(ids, new_tokens, real)
    for row, new in enumerate(lm.generating.new_tokens(found, real)):
        if len(new) < new_tokens:
            raise CheckFailure(f"row {row} must get {new_tokens} new tokens, saw {len(new)} in {found[row].tolist()}")
        how = "without padding" if lm.generating.ragged else f"with {'left' if left else 'right'} padding"
        what = (
            f"{how}, real lengths {real.sum(1).tolist()}, row {row} must go on with what is the likeliest token when "
            "it is alone"
        )
        must_be_likeliest(trial, lm, ids[row : row + 1, real[row]], new[None, :new_tokens], what)
