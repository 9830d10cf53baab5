"""A penalty on repetition lowers the tokens that a row holds already, and nothing else.

By which formula is left to the module: most divide positive logits (Keskar et al. 2019, CTRL, section 4.1) and multiply
negative ones, others subtract, or divide probabilities. By none of them may a token that is not lowered lose to a less
likely one.

Shapes: B batch, T prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.calling.outputs import read_output
from diymodel.verify.checks.generation import draw_prompt, must_be_likeliest
from diymodel.verify.forward_calls import forward_calls
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


@check(
    "generation.repetition_penalty",
    title="a repetition penalty makes no token likelier, and lowers in each row only what that row holds",
    step="3.1",
    needs=("greedy", "repetition_penalty"),
    causes=("repetition-penalty-wrong",),
)
@torch.no_grad()
def repetition_penalty(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    if len(ids) > 1:  # the first row holds what the second goes on with
        ids[0, 0] = lm.logits(ids)[1, -1].argmax()
    T = ids.shape[1]
    new_tokens = trial.draw("new_tokens", st.integers(1, min(3, lm.config.max_seq_len - T)))
    penalty = trial.draw("penalty", st.sampled_from((8.0, 2.0)))
    negative = trial.draw("negative", st.sampled_from((False, True, True)))  # where most go wrong
    with _negative_logits(lm) if negative else nullcontext():
        found = lm.greedy(ids, new_tokens, use_cache=False, repetition_penalty=penalty)
    must_be_likeliest(
        trial,
        lm,
        ids,
        found[:, T:],
        f"with repetition_penalty={penalty:g}{' and all logits below 0' * negative}, a new token must be at least as "
        "likely, unpenalised, as each that its row does not hold yet",
        rivals=lambda whole: ~_held(whole, T, lm.config.vocab_size),
    )


def _held(whole: Tensor, prompt: int, vocab_size: int) -> Tensor:
    """(B, N, V) bool: what stands in each row before each new token."""
    return F.one_hot(whole[:, :-1], vocab_size).cumsum(1)[:, prompt - 1 :] > 0


def _negative_logits(lm: LM) -> AbstractContextManager[None]:
    """Inside, all logits of a position are lowered alike, to below 0, which softmax does not see."""

    def lower(output: Any) -> None:
        logits = read_output(output, lm.config.vocab_size).logits
        if logits is not None:
            logits.sub_(logits.amax(-1, keepdim=True) + 1)

    return forward_calls(lm.module, lower)
