"""``torch.compile``: the compiled module computes the same, and a cached step does not compile it anew.

Compiling takes seconds, so these checks are optional. No code is generated: what differs or recompiles does so before.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, said
from diymodel.verify.registry import check
from diymodel.verify.trial import MAX_LENGTH, Trial

_SMALL: dict[str, Any] = {"num_layers": 1, "dropout": 0.0}
_PROMPT = 2  # tokens
_STEPS = 7  # after the prompt; torch compiles a function at most 8 times, and then no more
_SETTLED = 3  # steps in which sizes and counters are seen to change


@check(
    "compile.agrees",
    title="the compiled module gives the same logits, whole and on a cache",
    step="3.2",
    causes=("mask-dropped-on-fast-path", "state-survives-calls"),
    optional=True,
)
def agrees(trial: Trial) -> None:
    lm = trial.model(**_SMALL)
    ids = _row(trial, lm, trial.draw("length", st.integers(3, MAX_LENGTH)))
    expected = _whole_and_cached(trial, lm, ids)
    with compiled(lm, "aot_eager") as other:
        seen = _whole_and_cached(trial, other, ids)
    for how, logits in expected.items():
        what = f"compiled and called {how}, the logits must be those of the module as it is"
        trial.same(seen[how], logits, what, lm, lambda how=how: _whole_and_cached(trial, lm, ids)[how])  # type: ignore[misc]


@torch.no_grad()
def _whole_and_cached(trial: Trial, lm: LM, ids: Tensor) -> dict[str, Tensor]:
    """Logits by how they were computed."""
    logits = {"on the whole row": lm.logits(ids)}
    if trial.subject.missing("cache") is None:
        first, past = lm.extend(ids[:, :-2])
        second, past = lm.extend(ids[:, -2:-1], past)
        third, _ = lm.extend(ids[:, -1:], past)
        logits["on a cache"] = torch.cat((first, second, third), 1)
    return logits


@check(
    "compile.no_recompile_per_step",
    title="the cached steps of a compiled module soon compile nothing anew",
    step="3.2",
    needs=("cache",),
    causes=("recompile-per-step",),
    optional=True,
)
def no_recompile_per_step(trial: Trial) -> None:
    lm = trial.model(_PROMPT + _STEPS, **_SMALL)
    ids = _row(trial, lm, _PROMPT + _STEPS)
    compilations = 0

    def counting(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    counts = []
    with compiled(lm, counting) as other:
        _, past = other.extend(ids[:, :_PROMPT])
        for position in range(_PROMPT, _PROMPT + _STEPS):
            before = compilations
            _, past = other.extend(ids[:, position : position + 1], past)
            counts.append(compilations - before)
    if all(counts[_SETTLED:]):
        raise CheckFailure(
            f"after the first {_SETTLED} of {_STEPS} cached steps, some must run what is compiled already, saw every "
            f"one compile again: {counts} compilations"
        )


def _row(trial: Trial, lm: LM, length: int) -> Tensor:
    """One row (1, T), its tokens one after the other."""
    first = trial.draw("first", st.integers(0, lm.config.vocab_size - 1))
    return (first + torch.arange(length, device=trial.device)[None]) % lm.config.vocab_size


@contextlib.contextmanager
def compiled(lm: LM, backend: Any) -> Iterator[LM]:
    """The same module, to be compiled on its first call."""
    import torch._dynamo  # takes seconds

    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)  # it says at length where it gave up, which is no failure
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield LM(torch.compile(lm.module, backend=backend), lm.config, lm.convention)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise NotApplicable(f"torch.compile cannot compile the module: {said(error)}") from error
    finally:
        torch._dynamo.reset()
        log.setLevel(level)
