"""Gradients arrive at every parameter."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, first_of, refusal
from diymodel.verify.learning import WIDE_ENOUGH, distinct_tokens, trainable
from diymodel.verify.reaching import (
    ALL,
    MANY,
    Objective,
    further_logits,
    in_training,
    leave_unreached,
    nudged,
    own_losses,
    redrawn,
    weighted_logits,
    without_effect,
)
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_MORE_LAYERS = 4  # in some models only every fourth layer has a part


@check(
    "gradients.reach_every_parameter",
    title="every parameter gets a gradient from the logits",
    step="1.2",
    needs=("gradient",),
    causes=(
        "gradient-detached",
        "module-never-called",
        "router-without-gradient",
        "saved-tensor-overwritten",
        "parameters-unregistered",
    ),
)
def reach_every_parameter(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, **WIDE_ENOUGH)
    ids = distinct_tokens(trial, lm)
    unreached = _unreached(trial, lm, ids)
    if unreached and (deeper := _deeper(trial, lm, ids)) is not None:
        kinds = {_kind(name) for name in _unreached(trial, deeper, ids, MANY)}
        unreached = {name for name in unreached if _kind(name) in kinds}
    if unreached:
        raise CheckFailure(
            f"every parameter must get a gradient from the logits, saw none at {first_of(sorted(unreached))}"
        )


def _unreached(trial: Trial, lm: LM, ids: Tensor, draws: range = ALL) -> set[str]:
    """The parameters that learn from the logits in neither mode, nor from a loss or further logits that they serve."""
    unreached = set(trainable(lm))
    leave_unreached(unreached, trial, lm, ids, weighted_logits, draws)
    unreached = {name for name in unreached if not any(fnmatchcase(name, glob) for glob in trial.subject.no_gradient)}
    with suppress(Exception):  # what training mode refuses is told by other checks
        leave_unreached(unreached, trial, lm, ids, in_training)
    if unreached and (lm.convention.labels or lm.convention.loss_switch):  # whatever else is in that loss
        with suppress(Exception):  # likewise
            unreached -= _serving(own_losses, trial, lm, ids, unreached)
    if unreached:
        with suppress(Exception):  # likewise
            unreached -= _serving(further_logits, trial, lm, ids, unreached)
    return unreached - _only_choosing(trial, lm, ids, unreached)


def _serving(objective: Objective, trial: Trial, lm: LM, ids: Tensor, unreached: set[str]) -> set[str]:
    """Those of some parameters that no logit depends on, and that learn from something else: the loss, further logits.

    A router that is cut off has its part in the logits, and may get gradients from a loss that balances experts.
    """
    aside = without_effect(trial, lm, ids, unreached, redrawn)
    left = set(aside)
    leave_unreached(left, trial, lm, ids, objective)
    return aside - left


def _only_choosing(trial: Trial, lm: LM, ids: Tensor, names: set[str]) -> set[str]:
    """Those vectors of some parameters that logits follow in jumps alone, as those that choose experts.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) adds a bias to a router's scores where it chooses and not where it
    weighs, and moves it by hand. A matrix is meant to learn: a router that only chooses never does.
    """
    vectors = {name for name, parameter in trainable(lm).items() if name in names and parameter.dim() == 1}
    if not vectors:
        return vectors
    still = without_effect(trial, lm, ids, vectors, nudged)
    return still - without_effect(trial, lm, ids, still, redrawn)


def _deeper(trial: Trial, lm: LM, ids: Tensor) -> LM | None:
    """The same with more layers; None where the subject has no such module."""
    config = replace(lm.config, num_layers=lm.config.num_layers + _MORE_LAYERS)
    config = replace(config, **trial.subject.own_sizes)
    if config == lm.config or refusal(trial.subject.made, config) is not None:
        return None
    deeper = trial.build(config, trial.values["weights"], 1)
    return deeper if refusal(deeper.logits, ids) is None else None


def _kind(name: str) -> str:
    """A parameter's name without numbers: the last layer has another one in a deeper module."""
    return re.sub("[0-9]+", "#", name)
