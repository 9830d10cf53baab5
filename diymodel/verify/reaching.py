"""Which parameters an objective gives a gradient, and which the logits depend on at all.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import NotApplicable, refusal
from diymodel.verify.graph import only_added
from diymodel.verify.held import tensors_in
from diymodel.verify.learning import gradients_of, trainable
from diymodel.verify.trial import Trial

ALL, MANY = range(6), range(3, 6)  # draws, and those of many tokens: what is 0 by bad luck in one is not in three
_ROWS = (32, 16, 8, 4, 2, 1)  # of many tokens: the cache that a module keeps may be of no more

Objective = Callable[[LM, Tensor, int], Tensor]  # of a module, ids (B, T) and a seed: a number to take the gradient of


def leave_unreached(
    unreached: set[str],
    trial: Trial,
    lm: LM,
    ids: Tensor,
    objective: Objective,
    draws: range = MANY,
) -> None:
    """Take from ``unreached`` what gets a gradient from an objective, in any of several draws of the weights."""
    for seed in draws:
        if not unreached:
            return
        if seed == MANY.start:
            ids = _many(lm, ids)
        lm = trial.build(lm.config, trial.values["weights"] + seed, 1)
        value = objective(lm, ids, seed)
        found = gradients_of(value, trainable(lm))
        unreached -= reached(found, set())
        if unreached:
            unreached -= reached(found, only_added(value, trainable(lm)))


def _many(lm: LM, ids: Tensor) -> Tensor:
    """Rows as many and as long as can be: a few tokens may choose no expert, and never reach the next segment."""
    size = _ROWS[0], lm.config.max_seq_len
    many = torch.randint(lm.config.vocab_size, size, generator=torch.Generator().manual_seed(MANY.start)).to(ids)
    longest = next(T for T in range(size[1], 0, -1) if refusal(lm.logits, many[:1, :T]) is None)
    rows = next(B for B in _ROWS if B == 1 or refusal(lm.logits, many[:B, :longest]) is None)
    return many[:rows, :longest]


def reached(found: dict[str, Tensor | None], biases: set[str]) -> set[str]:
    """The parameters with a gradient; a matrix needs one that is more than the rounding of the largest.

    A vector does not, and no bias of any shape: that of a key moves all scores of a query alike, and has nothing but
    rounding. A NaN is one too, and the matter of gradients.finite.
    """
    sizes = {name: float(g.abs().max()) for name, g in found.items() if g is not None and g.numel()}
    least = torch.finfo(torch.float64).eps * max(filter(math.isfinite, sizes.values()), default=0.0)
    vectors = {name for name, gradient in found.items() if gradient is not None and gradient.dim() < 2}
    return {name for name, size in sizes.items() if not size <= (0.0 if name in vectors | biases else least)}


# --- objectives -------------------------------------------------------------------------------------------------------


def weighted_logits(lm: LM, ids: Tensor, seed: int) -> Tensor:
    """The logits, at random weights."""
    logits = lm.logits(ids)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
    return (logits * weights).sum()


def in_training(lm: LM, ids: Tensor, seed: int) -> Tensor:
    """The same in training mode."""
    lm.module.train()
    return weighted_logits(lm, ids, seed)


def own_losses(lm: LM, ids: Tensor, seed: int) -> Tensor:
    """The module's own loss in training mode, and what else a call for it returns a number of, such as a total."""
    lm.module.train()
    returned: list[Any] = []
    with lm.module.register_forward_hook(lambda module, given, output: returned.append(output)):
        loss = lm.own_loss(ids, lm.own_labels(ids))
    others = [x for x in tensors_in(returned) if x.dim() == 0 and x.requires_grad and x is not loss]
    return torch.stack([x.double() for x in (loss, *others)]).sum()


def further_logits(lm: LM, ids: Tensor, seed: int) -> Tensor:
    """All that a call returns with a number for every token, such as the logits of a head for the token after next."""
    returned: list[Any] = []
    with lm.module.register_forward_hook(lambda module, given, output: returned.append(output)):
        width = lm.logits(ids).shape[-1]
    wide = [x for x in tensors_in(returned[-1]) if x.dim() > 2 and x.shape[-1] == width and x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in wide]).sum()


# --- what the logits depend on ----------------------------------------------------------------------------------------


@torch.no_grad()
def without_effect(
    trial: Trial, lm: LM, ids: Tensor, names: set[str], change: Callable[[Tensor, Tensor], Tensor]
) -> set[str]:
    """Those of some parameters that change no logit when each is given the values that ``change`` makes of noise."""
    lm = trial.build(lm.config, trial.values["weights"], 1)
    many, generator = _many(lm, ids), torch.Generator().manual_seed(MANY.start)
    parameters = trainable(lm)

    def within(some: list[str]) -> set[str]:
        before = _of_a_copy(lm, many)
        for _ in ALL:  # a choice of two experts goes the same way in every second draw
            for name in some:
                noise = torch.randn(parameters[name].shape, generator=generator).to(parameters[name])
                parameters[name].copy_(change(parameters[name], noise))
            if not _of_a_copy(lm, many).equal(before):
                half = len(some) // 2
                return within(some[:half]) | within(some[half:]) if half else set()
        return set(some)

    return within([name for name in parameters if name in names]) if names else set()


def _of_a_copy(lm: LM, ids: Tensor) -> Tensor:
    """Logits, of a module that is as it was afterwards even where calls move its weights; if it can be copied."""
    with suppress(NotApplicable):
        lm = lm.twin()
    return lm.logits(ids)


def redrawn(parameter: Tensor, noise: Tensor) -> Tensor:
    """Any other values."""
    return noise


def nudged(parameter: Tensor, noise: Tensor) -> Tensor:
    """So near that a choice is hardly ever another, and far enough that a sum is."""
    return parameter + noise * math.sqrt(torch.finfo(parameter.dtype).eps)
