"""The same seed, the same trials: torch's global random state, and where Hypothesis takes numbers from."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

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


@contextlib.contextmanager
def constants_from_no_module() -> Iterator[None]:
    """Hypothesis takes every twentieth number from the source of whatever modules are imported; here it does not.

    Or the same seed would draw other trials once a line of the subject's file has changed, and in pytest others than
    on the command line. It has no setting for that; versions before 6.132 do it otherwise, or not at all.
    """
    try:
        providers = importlib.import_module("hypothesis.internal.conjecture.providers")
        cache, nothing = providers.CONSTANTS_CACHE.cache, providers.Constants()
    except (ImportError, AttributeError):
        yield
        return
    with mock.patch.object(providers, "_get_local_constants", return_value=nothing):
        cache.clear()
        try:
            yield
        finally:
            cache.clear()
