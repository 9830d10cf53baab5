"""Torch's global random state: set to a known value for a trial, and put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def reseed() -> None:
    """Start torch's global generators from 0: what follows, dropout for one, is the same each time.

    Not ``torch.manual_seed``, which takes a millisecond to note where it was called for backends that are not there.
    """
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Global generators that start from 0; that of the CPU is afterwards as it was before."""
    state = torch.get_rng_state()
    reseed()
    try:
        yield
    finally:
        torch.set_rng_state(state)
