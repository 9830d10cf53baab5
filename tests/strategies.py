"""Our model on random weights and batches, for the tests of what only our interface has.

Configurations and weights are drawn as in the harness. A failing example is printed as a ``Case(...)``: configuration,
weight seed and tokens, which is all that a person needs to see the failure again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.verify.strategies import configs, real_lengths
from diymodel.verify.tolerance import rounding
from diymodel.verify.trial import MAX_LENGTH, MAX_ROWS, draw_weights

SEEDS = st.integers(0, 2**16)

Row = list[int]


@dataclass(frozen=True)
class Case:
    """A model to build and a batch to call it with."""

    config: DIYConfig
    seed: int
    sharpness: int
    tokens: list[Row]

    @property
    def input_ids(self) -> Tensor:
        return torch.tensor(self.tokens)

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return len(self.tokens[0])

    def model(self) -> DIYForCausalLM:
        """A new model in float64 and eval mode."""
        model = DIYForCausalLM(self.config).double().eval()
        draw_weights(model, self.seed, self.sharpness)
        return model


@st.composite
def cases(
    draw: st.DrawFn,
    min_length: int = 1,
    min_rows: int = 1,
    room: int = 0,
    max_sharpness: int = 3,
    tied: bool | None = None,
) -> Case:
    """Models with batches of ``min_length`` to ``MAX_LENGTH`` tokens, often as many as the model takes.

    Args:
        room: positions that stay free for continuing the batch.
        max_sharpness: 1 where the property needs a softmax that is not saturated.
        tied: whether embedding and head are one weight; None: either.
    """
    length = draw(st.integers(min_length, MAX_LENGTH))
    values = draw(configs(length + room))
    config = DIYConfig.from_dict(values if tied is None else {**values, "tie_word_embeddings": tied})
    tokens = draw(st.lists(token_rows(config, length, length), min_size=min_rows, max_size=MAX_ROWS))
    return Case(config, draw(SEEDS), draw(st.integers(1, max_sharpness)), tokens)


def token_rows(config: DIYConfig, shortest: int, longest: int) -> st.SearchStrategy[Row]:
    """One row of tokens."""
    return st.lists(st.integers(0, config.vocab_size - 1), min_size=shortest, max_size=longest)


def batches(config: DIYConfig, num_rows: int, length: int) -> st.SearchStrategy[Tensor]:
    """Token ids (num_rows, length)."""
    return st.lists(token_rows(config, length, length), min_size=num_rows, max_size=num_rows).map(torch.tensor)


def lengths(case: Case, shortest: int = 1) -> st.SearchStrategy[Tensor]:
    """How many tokens of each row of a case are real, (num_rows,)."""
    return real_lengths(case.num_rows, case.length, shortest).map(torch.tensor)


def assert_near(seen: Tensor, expected: Tensor) -> None:
    """Equal up to what rounding explains in float64."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(seen, expected, rtol=0.0, atol=rounding(torch.float64) * largest)
