"""Where generation ends: each row at its own end-of-sequence token.

Shapes: B batch, T prompt length, N new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.generation import LONGEST, draw_number, must_be_likeliest
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


def _draw_rows(trial: Trial, lm: LM) -> Tensor:
    """Token ids (B, T), several rows where generate takes them."""
    return trial.tokens(lm, 1, LONGEST, rows=1 if lm.generating.one_row else trial.draw("batch", st.integers(2, 3)))


def _must_end_with(trial: Trial, lm: LM, ids: Tensor, new_tokens: int, eos: int, where: str = "") -> None:
    """Fail unless each row goes on with its likeliest tokens up to its first new ``eos``, and no further.

    Args:
        where: what a failure adds of the token.
    """
    pad = (eos + trial.draw("pad_after_eos", st.integers(0, 1))) % lm.config.vocab_size
    settings: dict[str, Any] = {"eos": eos, "pad": pad} if "pad" in lm.generating.names else {"eos": eos}
    found = lm.greedy(ids, new_tokens, **settings)[:, ids.shape[1] :]
    for row, tokens in enumerate(found.tolist()):
        end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        own = found[row : row + 1, :end]
        if eos not in tokens and end < new_tokens:  # it may be left out, but nothing else ends a row
            own = F.pad(own, (0, 1), value=eos)
        what = (
            f"row {row}, which got {tokens}, must get the likeliest token each time and end with eos={eos}{where} alone"
        )
        must_be_likeliest(trial, lm, ids[row : row + 1], own, what)
        filler, after = f"pad={pad}", {pad, *tokens[end:]}
        if "pad" not in settings:  # what it fills up with is its own choice
            filler, after = "one token that fills it up", set(tokens[end:])
        if len(after) > 1:
            raise CheckFailure(
                f"after its eos={eos}, row {row} of a batch of {len(ids)} must hold only {filler}, saw {tokens}"
            )


@check(
    "generation.eos_per_row",
    title="in a batch, every row goes on until its own end-of-sequence token, and no further",
    step="3.1",
    needs=("greedy", "eos"),
    causes=("eos-not-per-row",),
)
def eos_per_row(trial: Trial) -> None:
    lm = trial.model()
    ids = _draw_rows(trial, lm)
    new_tokens = draw_number(trial, lm, ids)
    without = lm.greedy(ids, new_tokens)[:, ids.shape[1] :]
    drawn = trial.draw("ending_row", st.integers(0, without.shape[0] - 1)) * without.shape[1]
    drawn += trial.draw("ending_step", st.integers(0, without.shape[1] - 1))
    generated, prompt = without.flatten().tolist(), set(ids.flatten().tolist())
    ends = [token for token in generated[drawn:] + generated[:drawn] if token not in prompt]
    if not ends:
        raise NotApplicable("each token that is generated stands in a prompt as well")
    _must_end_with(trial, lm, ids, new_tokens, ends[0])


@check(
    "generation.eos_in_prompt",
    title="an end-of-sequence token that stands in the prompt ends nothing",
    step="3.1",
    needs=("greedy", "eos"),
    causes=("eos-in-prompt-ends",),
)
def eos_in_prompt(trial: Trial) -> None:
    lm = trial.model()
    ids = _draw_rows(trial, lm)
    new_tokens = draw_number(trial, lm, ids)
    row = trial.draw("row", st.integers(0, ids.shape[0] - 1))
    eos = int(ids[row, trial.draw("place", st.integers(0, ids.shape[1] - 1))])
    _must_end_with(trial, lm, ids, new_tokens, eos, f" (a new one: it stands in the prompt of row {row} too)")
    if lm.generating.ragged and min(ids.shape) > 1:
        _must_go_on_beside_shorter(trial, lm, ids, row, new_tokens, eos)


def _must_go_on_beside_shorter(trial: Trial, lm: LM, ids: Tensor, row: int, new_tokens: int, eos: int) -> None:
    """Fail unless a row goes on as it does alone, where the other prompts end before it.

    Meta's ``generate`` reads the rest of a longer prompt in the loop that generates for the shorter ones.
    """
    shorter = trial.draw("shorter", st.integers(1, ids.shape[1] - 1))
    real = torch.ones_like(ids, dtype=torch.bool)
    real[:, shorter:] = False
    real[row] = True
    alone = lm.greedy(ids[row : row + 1], new_tokens, eos=eos)[:, ids.shape[1] :]
    beside = lm.generating.new_tokens(lm.greedy(ids, new_tokens, real, eos=eos), real)[row][: alone.shape[1]]
    what = f"row {row} with eos={eos} in its prompt, beside shorter ones of {shorter}, must go on as it does alone"
    if len(beside) < alone.shape[1]:
        raise CheckFailure(f"{what}, by {alone[0].tolist()}, saw {beside.tolist()}")
    if len(beside):
        must_be_likeliest(trial, lm, ids[row : row + 1], beside[None], what)
