"""What trials are drawn from. Small values come first in every choice: failures shrink to what fits on paper."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st


@st.composite
def configs(draw: st.DrawFn, length: int) -> dict[str, Any]:
    """Tiny configurations that hold ``length`` positions, as dicts of DIYConfig's fields.

    One layer and several, grouped queries, dropout, tying, other epsilons and thetas all turn up.
    """
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    head_size = 2 * draw(st.sampled_from((1, 2, 4)))  # 8: with half of it rotated, there are still two frequencies
    return {
        "vocab_size": draw(st.integers(length + 2, length + 6)),
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": heads * head_size,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 9)),
        "max_seq_len": length + draw(st.integers(0, 3)),
        "dropout": draw(st.sampled_from((0.0, 0.1, 0.5))),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        "rope_theta": draw(st.sampled_from((10000.0, 10.0, 500000.0))),
        "tie_word_embeddings": draw(st.booleans()),
    }


def real_lengths(rows: int, longest: int, shortest: int = 1) -> st.SearchStrategy[list[int]]:
    """How many tokens of each row are real."""
    return st.lists(st.integers(shortest, longest), min_size=rows, max_size=rows)


@st.composite
def chunk_sizes(draw: st.DrawFn, length: int) -> list[int]:
    """Sizes of the chunks in which ``length`` tokens are fed, at least two where there are two tokens."""
    cuts = draw(st.sets(st.integers(1, length - 1), min_size=1)) if length > 1 else set()
    edges = [0, *sorted(cuts), length]
    return [end - start for start, end in itertools.pairwise(edges)]
