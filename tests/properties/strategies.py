"""What the properties are tried on: configurations, weights, tokens, cuts, splits, lengths and label masks.

Everything drawn is a plain value whose repr is Python, so Hypothesis's "Falsifying example" is the reproduction. Small
integers come first in every choice: failures shrink to one layer, one head and two tokens. Hypothesis does not see
torch's random state, so weights follow from a drawn seed, with one Generator a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel import DIYConfig, DIYForCausalLM

MAX_LENGTH = 8
MAX_ROWS = 3
SEEDS = st.integers(0, 2**16)

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """A model to build and a batch to call it with."""

    config: DIYConfig
    seed: int
    sharpness: int
    tokens: Rows

    @property
    def input_ids(self) -> Tensor:
        return torch.tensor(self.tokens)

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return len(self.tokens[0])

    def model(self, dtype: torch.dtype = torch.float64) -> DIYForCausalLM:
        """The model, in eval mode; a new one at each call."""
        model = DIYForCausalLM(self.config).to(dtype).eval()
        draw_weights(model, self.seed, self.sharpness)
        return model


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int, sharpness: int) -> None:
    """Weights sharp enough that a bug shows: matrices from N(0, (sharpness/√d)²), vectors around 1.

    The usual 0.02 makes every distribution near-uniform; N(0, 1) saturates attention, which hides masks.
    """
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
        parameter.copy_(1 + noise / 4 if parameter.dim() == 1 else noise * sharpness / parameter.shape[1] ** 0.5)


@st.composite
def configs(draw: st.DrawFn, length: int = 1, tied: bool | None = None, dropout: float | None = None) -> DIYConfig:
    """Tiny configurations that hold ``length`` positions; each feature is on in about half of them."""
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    head_size = 2 * draw(st.integers(1, 2 if heads <= 4 else 1))
    return DIYConfig(
        vocab_size=draw(st.integers(MAX_LENGTH, MAX_LENGTH + 4)),
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * head_size,
        num_heads=heads,
        max_seq_len=length + draw(st.integers(0, 3)),
        dropout=draw(st.sampled_from((0.0, 0.1, 0.5))) if dropout is None else dropout,
        num_kv_heads=kv_heads,
        intermediate_size=draw(st.integers(1, 9)),
        rms_norm_eps=draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        rope_theta=draw(st.sampled_from((10000.0, 10.0, 500000.0))),
        tie_word_embeddings=draw(st.booleans()) if tied is None else tied,
    )


@st.composite
def cases(
    draw: st.DrawFn,
    min_length: int = 1,
    min_rows: int = 1,
    room: int = 0,
    distinct: bool = False,
    max_sharpness: int = 3,
    tied: bool | None = None,
    dropout: float | None = None,
) -> Case:
    """Models with batches of ``min_length`` to ``MAX_LENGTH`` tokens, often as many as the model takes.

    Args:
        room: positions that stay free for continuing the batch.
        distinct: no token twice in a row of the batch. Where all tokens are equal, attention averages equal values,
            so weights, masks and positions have no effect.
        max_sharpness: 1 where the property needs an attention that is not saturated.
    """
    length = draw(st.integers(min_length, MAX_LENGTH))
    config = draw(configs(length + room, tied, dropout))
    if distinct:
        row = st.permutations(range(config.vocab_size)).map(lambda tokens: tuple(tokens[:length]))
    else:
        row = token_rows(config, length)
    rows = draw(st.lists(row, min_size=min_rows, max_size=max(min_rows, MAX_ROWS)))
    return Case(config, draw(SEEDS), draw(st.sampled_from((1, max_sharpness))), tuple(rows))


def token_rows(config: DIYConfig, length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """One row of tokens."""
    return st.lists(st.integers(0, config.vocab_size - 1), min_size=length, max_size=length).map(tuple)


@st.composite
def batches(draw: st.DrawFn, config: DIYConfig, num_rows: int, length: int) -> Tensor:
    """Token ids (num_rows, length)."""
    return torch.tensor([draw(token_rows(config, length)) for _ in range(num_rows)]).view(num_rows, length)


def edits(case: Case) -> st.SearchStrategy[Tensor]:
    """Token ids of the case's shape that differ from the case's own at every position."""
    row = st.lists(st.integers(1, case.config.vocab_size - 1), min_size=case.length, max_size=case.length)
    shifts = st.lists(row, min_size=case.num_rows, max_size=case.num_rows).map(torch.tensor)
    return shifts.map(lambda shift: (case.input_ids + shift) % case.config.vocab_size)


@st.composite
def splits(draw: st.DrawFn, length: int) -> list[int]:
    """Sizes of the chunks in which ``length`` tokens are fed."""
    sizes: list[int] = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(draw(st.integers(1, left)))
    return sizes


def lengths(num_rows: int, longest: int, shortest: int = 1) -> st.SearchStrategy[Tensor]:
    """Real tokens of each row, (num_rows,)."""
    return st.lists(st.integers(shortest, longest), min_size=num_rows, max_size=num_rows).map(torch.tensor)


@st.composite
def label_masks(draw: st.DrawFn, num_rows: int, length: int) -> Tensor:
    """Which labels are scored, (num_rows, length): none, exactly one, any, or all."""
    total = num_rows * length
    live = draw(
        st.one_of(
            st.just([False] * total),
            st.integers(0, total - 1).map(lambda only: [index == only for index in range(total)]),
            st.lists(st.booleans(), min_size=total, max_size=total),
            st.just([True] * total),
        )
    )
    return torch.tensor(live).view(num_rows, length)
