"""A peer that decodes: one interface, and proof that it computes the same."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diymodel.bench.decoders import random_ids
from diymodel.model import DIYForCausalLM

LARGEST_LOGIT_DIFFERENCE = 1e-4  # float32; two correct implementations differ by about 5e-6, a wrong one by far more


class PeerMissing(Exception):
    """Why a peer cannot be measured here."""


class Room(NamedTuple):
    """What a cache of fixed size must hold."""

    rows: int
    positions: int


@dataclass(frozen=True)
class Rival:
    """A peer that is built.

    ``prefill`` takes prompts (B, T), forgets what came before, and returns logits that end with the last position's and
    a state; ``step`` takes one token a row (B, 1) and the state, and returns the same of it.
    """

    prefill: Callable[[Tensor], tuple[Tensor, Any]]
    step: Callable[[Tensor, Any], tuple[Tensor, Any]]
    same_weights: bool
    to: Callable[[torch.dtype], object]
    generate: Callable[[Tensor, int], Tensor] | None = None  # prompts (B, T), new tokens -> (B, T + new)
    construct: Callable[[], object] | None = None  # a new model with random weights
    note: str = ""


def require(package: str) -> Any:
    """The package, imported with its own warnings silenced.

    Raises:
        PeerMissing: it is not installed, or does not import.
    """
    if importlib.util.find_spec(package) is None:
        raise PeerMissing(f"{package} is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except Exception as error:  # a package that is broken on this machine may raise anything
        raise PeerMissing(f"{package} does not import here: {type(error).__name__}: {error}") from error


@torch.inference_mode()
def logit_difference(model: DIYForCausalLM, rival: Rival, rows: int = 1) -> float:
    """The largest difference between the logits of the two, after a prompt and after each of a few steps.

    Call it in float32: half types round differently in each model.

    Raises:
        ValueError: they differ by more than :data:`LARGEST_LOGIT_DIFFERENCE`, so comparing times would mean nothing.
    """
    length = 48
    ids = random_ids(model.config.vocab_size, rows, length, model.lm_head.weight.device)
    ours = model(ids)
    worst = 0.0
    logits, state = rival.prefill(ids[:, :-4])
    for end in range(length - 4, length + 1):
        last = logits[:, -1, : model.config.vocab_size]
        worst = max(worst, float((last - ours[:, end - 1]).abs().max()))
        if end < length:
            logits, state = rival.step(ids[:, end : end + 1], state)
    if not worst <= LARGEST_LOGIT_DIFFERENCE:
        raise ValueError(
            f"the two models' logits differ by {worst:.2g}, more than {LARGEST_LOGIT_DIFFERENCE:g}: they do not "
            "compute the same thing, and comparing their times would mean nothing"
        )
    return worst
