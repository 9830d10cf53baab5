"""What is generated beyond max_seq_len follows from what the model may still see.

Shapes: B batch, T prompt length, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.generation import draw_prompt, must_be_likeliest
from diymodel.verify.failure import CheckFailure, refusal, said
from diymodel.verify.forward_calls import forward_calls
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "generation.past_context",
    title="asked for more tokens than max_seq_len, generate refuses, or goes on from the last ones",
    step="4.1",
    needs=("greedy", "past_context"),
    causes=("context-crop-wrong", "prompt-not-kept"),
)
def past_context(trial: Trial) -> None:
    lm = trial.model(length=4)
    ids = draw_prompt(trial, lm)
    longest, T = lm.config.max_seq_len, ids.shape[1]
    new_tokens = longest - T + trial.draw("too_many", st.integers(2, 5))
    names = lm.generating.names
    settings: dict[str, Any] = {"use_cache": trial.draw("use_cache", st.booleans())} if "use_cache" in names else {}
    how = f" with use_cache={settings['use_cache']}" if settings else ""
    what = f"of {T} prompt tokens and {new_tokens} new ones, more than max_seq_len={longest}, generate{how} must"
    calls: list[Any] = []
    try:
        with forward_calls(lm.module, calls.append):
            found = lm.greedy(ids, new_tokens, **settings)
    except Exception as error:  # any error a stranger chooses is a refusal
        fits = refusal(lambda: lm.greedy(ids, longest - T, **settings)) is None
        if calls and fits and _goes_on(lm, ids, longest + 1, settings):
            raise CheckFailure(
                f"{what} refuse before the first or go on, as it does after {longest + 1} prompt tokens, "
                f"saw {said(error)}, after {len(calls)} calls of forward"
            ) from error
        return
    if not torch.equal(found[:, :T], ids):
        raise CheckFailure(f"{what} keep the prompt {ids.tolist()}, saw {found.tolist()}")
    kept = (longest, longest - 1, found.shape[1])  # a crop, one that leaves room for the next token, or no limit at all
    what += f" refuse, or take the likeliest token after the last {longest} (or {longest - 1}, or all)"
    beyond = range(longest + 1, found.shape[1])
    wrong = [_wrong_with(trial, lm, found, beyond, seen, what) for seen in kept]
    if not all(wrong):
        return
    larger = _with_room(trial, lm, found.shape[1])
    if larger is None or _wrong_with(trial, larger, found, beyond, found.shape[1], what):
        raise next(failure for failure in wrong if failure)


def _goes_on(lm: LM, ids: Tensor, length: int, settings: dict[str, Any]) -> bool:
    """Whether ``generate`` cuts a prompt of so many tokens to what fits, and answers."""
    prompt = ids.repeat(1, length)[:, :length]
    try:
        return lm.greedy(prompt, 1, **settings).shape[1] > length
    except Exception:  # any error a stranger chooses is a refusal
        return False


def _with_room(trial: Trial, lm: LM, length: int) -> LM | None:
    """The same weights in a module that holds ``length`` positions: ``generate`` may go on, on its cache, where
    ``forward`` takes no more at once. None where they do not fit into it, as a table of positions does not.
    """
    try:
        larger = trial.fresh(replace(lm.config, max_seq_len=length))
        with torch.no_grad():
            for parameter, own in zip(larger.module.parameters(), lm.module.parameters(), strict=True):
                parameter.copy_(own)
    except Exception:  # whatever it is, that is another model
        return None
    return larger


def _wrong_with(
    trial: Trial, lm: LM, found: Tensor, beyond: Iterable[int], seen: int, what: str
) -> CheckFailure | None:
    """What speaks against each token at the places ``beyond`` being the likeliest after the last ``seen``."""
    for place in beyond:
        try:
            must_be_likeliest(trial, lm, found[:, max(0, place - seen) : place], found[:, place : place + 1], what)
        except CheckFailure as failure:
            return failure
        except Exception as error:  # forward may refuse the whole in a way of its own
            return CheckFailure(said(error))
    return None
