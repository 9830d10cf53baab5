"""Gradients arrive at every parameter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, first_of, refusal
from diymodel.verify.graph import only_added
from diymodel.verify.learning import distinct_tokens, gradients_of, trainable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

# A single ReLU may well be off at every token, and a LayerNorm over two features passes hardly any gradient on.
_WIDE_ENOUGH = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}
_DRAWS = 3  # what is 0 by bad luck in one draw is not in three
_MANY_ROWS = 32


@check(
    "gradients.reach_every_parameter",
    title="every parameter gets a gradient from the logits",
    step="1.2",
    needs=("gradient",),
    causes=("gradient-detached", "module-never-called", "router-without-gradient", "parameters-unregistered"),
)
def reach_every_parameter(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, **_WIDE_ENOUGH)
    unreached = _unreached(trial, lm, distinct_tokens(trial, lm))
    if unreached:
        raise CheckFailure(
            f"every parameter must get a gradient from the logits, saw none at {first_of(sorted(unreached))}"
        )


def _unreached(trial: Trial, lm: LM, ids: Tensor) -> set[str]:
    """The parameters that learn from the logits neither in eval mode nor in training mode."""
    unreached = set(trainable(lm))
    _leave_unreached(unreached, trial, lm, ids, _weighted_logits)
    unreached = {name for name in unreached if not any(fnmatchcase(name, glob) for glob in trial.subject.no_gradient)}
    with suppress(Exception):  # what training mode refuses is told by other checks
        _leave_unreached(unreached, trial, lm, ids, _in_training)
    return unreached


def _weighted_logits(lm: LM, ids: Tensor, seed: int) -> Tensor:
    logits = lm.logits(ids)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
    return (logits * weights).sum()


def _in_training(lm: LM, ids: Tensor, seed: int) -> Tensor:
    lm.module.train()
    return _weighted_logits(lm, ids, seed)


def _leave_unreached(
    unreached: set[str], trial: Trial, lm: LM, ids: Tensor, objective: Callable[[LM, Tensor, int], Tensor]
) -> None:
    """Take from ``unreached`` what gets a gradient from an objective, in any of several draws of the weights."""
    for seed in range(2 * _DRAWS):
        if not unreached:
            return
        if seed == _DRAWS:
            ids = _many(lm, ids)
        lm = trial.build(lm.config, trial.values["weights"] + seed, 1)
        value = objective(lm, ids, seed)
        found = gradients_of(value, trainable(lm))
        unreached -= _reached(found, set())
        if unreached:
            unreached -= _reached(found, only_added(value, trainable(lm)))


def _many(lm: LM, ids: Tensor) -> Tensor:
    """Rows as long as can be: a few tokens may choose no expert, and never reach the next segment of a sequence."""
    size = _MANY_ROWS, lm.config.max_seq_len
    many = torch.randint(lm.config.vocab_size, size, generator=torch.Generator().manual_seed(_DRAWS)).to(ids)
    longest = next(T for T in range(size[1], 0, -1) if refusal(lm.logits, many[:1, :T]) is None)
    return many[:, :longest]


def _reached(found: dict[str, Tensor | None], biases: set[str]) -> set[str]:
    """The parameters with a gradient; a matrix needs one that is more than the rounding of the largest.

    A vector does not, and no bias of any shape: that of a key moves all scores of a query alike, and has nothing but
    rounding.
    """
    sizes = {name: float(g.abs().max()) for name, g in found.items() if g is not None and g.numel()}
    least = torch.finfo(torch.float64).eps * max(sizes.values(), default=0.0)
    vectors = {name for name, gradient in found.items() if gradient is not None and gradient.dim() < 2}
    return {name for name, size in sizes.items() if size > (0.0 if name in vectors | biases else least)}
