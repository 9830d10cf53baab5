"""Calls and failing trials, watched.

Shapes: T query length, S key length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from diymodel.verify.adapters import LM, Around
from diymodel.verify.experiments.watchers import AttentionWeights
from diymodel.verify.symptoms import Patient


def weights_of(lm: LM, call: Callable[[], object], log: bool = False) -> list[Tensor]:
    """Those (…, T, S) of each attention in a call, or their logarithms."""
    seen: list[Tensor] = []
    lm.around = partial(AttentionWeights, seen, log=log)
    try:
        call()
    finally:
        lm.around = None
    return seen


def weights_of_failures(patient: Patient, ids: Iterable[str]) -> list[Tensor]:
    """Those of every attention in the failing trials of these checks."""
    seen: list[Tensor] = []
    fail_again(patient, ids, partial(AttentionWeights, seen))
    return seen


def fail_again(patient: Patient, ids: Iterable[str], watcher: Around) -> None:
    """The failing trials of these checks, watched."""
    for id in ids:
        if id in patient.failed and patient.failed[id].failure is not None:
            patient.passes_now(patient.failed[id], watcher)


def later(weights: Tensor) -> Tensor:
    """Of keys behind their query (T, S)."""
    T, S = weights.shape[-2:]
    return torch.ones(T, S, dtype=torch.bool, device=weights.device).triu(S - T + 1)


def looks_ahead(seen: Iterable[Tensor]) -> bool:
    """Whether any of these weights (…, T, S) is on a key behind its query."""
    return any(bool(weights[..., later(weights)].any()) for weights in seen)
