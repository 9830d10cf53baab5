"""Gradients arrive at every parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, first_of, refusal
from diymodel.verify.graph import only_added
from diymodel.verify.held import tensors_in
from diymodel.verify.learning import distinct_tokens, gradients_of, trainable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

# A single ReLU may well be off at every token, and a LayerNorm over two features passes hardly any gradient on.
_WIDE_ENOUGH = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}
_ALL, _MANY = range(6), range(3, 6)  # draws, and those of many tokens: what is 0 by bad luck in one is not in three
_ROWS = 32  # of many tokens
_MORE_LAYERS = 4  # in some models only every fourth layer has a part


@check(
    "gradients.reach_every_parameter",
    title="every parameter gets a gradient from the logits",
    step="1.2",
    needs=("gradient",),
    causes=("gradient-detached", "module-never-called", "router-without-gradient", "parameters-unregistered"),
)
def reach_every_parameter(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, **_WIDE_ENOUGH)
    ids = distinct_tokens(trial, lm)
    unreached = _unreached(trial, lm, ids)
    if unreached and (deeper := _deeper(trial, lm, ids)) is not None:
        kinds = {_kind(name) for name in _unreached(trial, deeper, ids, _MANY)}
        unreached = {name for name in unreached if _kind(name) in kinds}
    if unreached:
        raise CheckFailure(
            f"every parameter must get a gradient from the logits, saw none at {first_of(sorted(unreached))}"
        )


def _unreached(trial: Trial, lm: LM, ids: Tensor, draws: range = _ALL) -> set[str]:
    """The parameters that learn from the logits in neither mode, nor from a loss or further logits that they serve."""
    unreached = set(trainable(lm))
    _leave_unreached(unreached, trial, lm, ids, _weighted_logits, draws)
    unreached = {name for name in unreached if not any(fnmatchcase(name, glob) for glob in trial.subject.no_gradient)}
    with suppress(Exception):  # what training mode refuses is told by other checks
        _leave_unreached(unreached, trial, lm, ids, _in_training)
    if unreached and (lm.convention.labels or lm.convention.loss_switch):  # whatever else is in that loss
        with suppress(Exception):  # likewise
            unreached -= _serving(_own_loss, trial, lm, ids, unreached)
    if unreached:
        with suppress(Exception):  # likewise
            unreached -= _serving(_further_logits, trial, lm, ids, unreached)
    return unreached - _only_choosing(trial, lm, ids, unreached)


def _serving(
    objective: Callable[[LM, Tensor, int], Tensor], trial: Trial, lm: LM, ids: Tensor, unreached: set[str]
) -> set[str]:
    """Those of some parameters that no logit depends on, and that learn from something else: the loss, further logits.

    A router that is cut off has its part in the logits, and may get gradients from a loss that balances experts.
    """
    aside = _without_effect(trial, lm, ids, unreached, _redrawn)
    left = set(aside)
    _leave_unreached(left, trial, lm, ids, objective)
    return aside - left


def _only_choosing(trial: Trial, lm: LM, ids: Tensor, names: set[str]) -> set[str]:
    """Those vectors of some parameters that logits follow in jumps alone, as those that choose experts.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) adds a bias to a router's scores where it chooses and not where it
    weighs, and moves it by hand. A matrix is meant to learn: a router that only chooses never does.
    """
    vectors = {name for name, parameter in trainable(lm).items() if name in names and parameter.dim() == 1}
    if not vectors:
        return vectors
    still = _without_effect(trial, lm, ids, vectors, _nudged)
    return still - _without_effect(trial, lm, ids, still, _redrawn)


def _redrawn(parameter: Tensor, noise: Tensor) -> Tensor:
    return noise


def _nudged(parameter: Tensor, noise: Tensor) -> Tensor:
    return parameter + noise * math.sqrt(torch.finfo(parameter.dtype).eps)


@torch.no_grad()
def _without_effect(
    trial: Trial, lm: LM, ids: Tensor, names: set[str], change: Callable[[Tensor, Tensor], Tensor]
) -> set[str]:
    """Those of some parameters that change no logit when each is given the values that ``change`` makes of noise."""
    lm = trial.build(lm.config, trial.values["weights"], 1)
    many, generator = _many(lm, ids), torch.Generator().manual_seed(_MANY.start)
    before, found = _of_a_copy(lm, many), set()
    for name, parameter in trainable(lm).items():
        if name in names:
            found.add(name)
            for _ in _ALL:  # a choice of two experts goes the same way in every second draw
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.copy_(change(parameter, noise))
                after = _of_a_copy(lm, many)
                if not after.equal(before):
                    found.discard(name)
                before = after
    return found


def _of_a_copy(lm: LM, ids: Tensor) -> Tensor:
    """Logits, of a module that is as it was afterwards even where calls move its weights; if it can be copied."""
    with suppress(NotApplicable):
        lm = lm.twin()
    return lm.logits(ids)


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


def _weighted_logits(lm: LM, ids: Tensor, seed: int) -> Tensor:
    logits = lm.logits(ids)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).to(logits)
    return (logits * weights).sum()


def _in_training(lm: LM, ids: Tensor, seed: int) -> Tensor:
    lm.module.train()
    return _weighted_logits(lm, ids, seed)


def _own_loss(lm: LM, ids: Tensor, seed: int) -> Tensor:
    lm.module.train()
    return lm.own_loss(ids, lm.own_labels(ids))


def _further_logits(lm: LM, ids: Tensor, seed: int) -> Tensor:
    """All that a call returns with a number for every token, such as the logits of a head for the token after next."""
    returned: list[Any] = []
    with lm.module.register_forward_hook(lambda module, given, output: returned.append(output)):
        width = lm.logits(ids).shape[-1]
    wide = [x for x in tensors_in(returned[-1]) if x.dim() > 2 and x.shape[-1] == width and x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in wide]).sum()


def _leave_unreached(
    unreached: set[str],
    trial: Trial,
    lm: LM,
    ids: Tensor,
    objective: Callable[[LM, Tensor, int], Tensor],
    draws: range = _MANY,
) -> None:
    """Take from ``unreached`` what gets a gradient from an objective, in any of several draws of the weights."""
    for seed in draws:
        if not unreached:
            return
        if seed == _MANY.start:
            ids = _many(lm, ids)
        lm = trial.build(lm.config, trial.values["weights"] + seed, 1)
        value = objective(lm, ids, seed)
        found = gradients_of(value, trainable(lm))
        unreached -= _reached(found, set())
        if unreached:
            unreached -= _reached(found, only_added(value, trainable(lm)))


def _many(lm: LM, ids: Tensor) -> Tensor:
    """Rows as long as can be: a few tokens may choose no expert, and never reach the next segment of a sequence."""
    size = _ROWS, lm.config.max_seq_len
    many = torch.randint(lm.config.vocab_size, size, generator=torch.Generator().manual_seed(_MANY.start)).to(ids)
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
