"""Torch's global random state: set to a known value for a trial, and put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def reseed(seed: int = 0) -> None:
    """Start torch's global generators from ``seed``: what follows, dropout for one, is the same each time.

    Not ``torch.manual_seed``, which takes a millisecond to note where it was called for backends that are not there.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Global generators that start from ``seed``; that of the CPU is afterwards as it was before."""
    state = torch.get_rng_state()
    reseed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
