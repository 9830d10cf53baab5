"""Attention is the same function on every backend that runs here, and in every implementation the module offers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diymodel._compat import SDPBackend, attention_backends, sdpa_kernel
from diymodel.verify.adapters import LM
from diymodel.verify.failure import NotApplicable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_REFUSALS = ("No viable backend", "No available kernel")  # torch's words where a backend cannot run
_SETTER = "set_attn_implementation"  # transformers' method, and its names of what every family can have
_IMPLEMENTATIONS = ("eager", "sdpa")
_SETTINGS = ("_attn_implementation", "attn_implementation")  # of a config, where there is no such method


@check(
    "causality.each_backend",
    title="every attention backend and implementation gives the same logits",
    step="1.1",
    causes=("attention-backends-disagree", "mask-dropped-on-fast-path", "window-off-by-one"),
)
def each_backend(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    runs = _implementations(lm, ids) | _backends(lm, ids)
    if not runs:
        raise NotApplicable(f"forward never calls scaled_dot_product_attention, and there is no {_SETTER}()")
    if len(runs) == 1:
        raise NotApplicable(f"{next(iter(runs))} is all that runs here")
    (first, (run_first, expected)), *others = runs.items()
    for name, (run, seen) in others:
        what = f"with {name} the logits must be those with {first}"
        trial.same(
            seen,
            expected,
            what,
            lm,
            lambda run=run: torch.cat((run_first(), run())),  # type: ignore[misc]
            kernels=True,
        )


Runs = dict[str, tuple[Callable[[], Tensor], Tensor]]  # by name: what computes logits, and the logits


def _implementations(lm: LM, ids: Tensor) -> Runs:
    """What the module can be switched between; it is left with the last of them."""
    if (switch := _switch(lm)) is None:
        return {}
    runs: Runs = {}
    for implementation in _IMPLEMENTATIONS:
        run = partial(_with_implementation, switch, lm, ids, implementation)
        try:
            runs[f"attn_implementation={implementation!r}"] = run, run()
        except (ValueError, ImportError):  # a family may lack one
            continue
    return runs


def _switch(lm: LM) -> Callable[[str], object] | None:
    """What switches the module between its implementations."""
    if hasattr(lm.module, _SETTER):
        method: Callable[[str], object] = getattr(lm.module, _SETTER)
        return method
    config = getattr(lm.module, "config", None)
    known = (name for name in _SETTINGS if getattr(config, name, None) in _IMPLEMENTATIONS)
    return next((partial(setattr, config, name) for name in known), None)


def _with_implementation(switch: Callable[[str], object], lm: LM, ids: Tensor, implementation: str) -> Tensor:
    switch(implementation)
    return lm.logits(ids)


def _backends(lm: LM, ids: Tensor) -> Runs:
    """Those of torch that can compute the module's attention; none where it does not call torch's."""
    if _unless_refused(partial(_with_backend, lm, ids, SDPBackend.ERROR)) is not None:
        return {}
    runs: Runs = {}
    for backend in attention_backends():
        run = partial(_with_backend, lm, ids, backend)
        logits = _unless_refused(run)
        if logits is not None:
            runs[str(backend)] = run, logits
    return runs


def _with_backend(lm: LM, ids: Tensor, backend: SDPBackend) -> Tensor:
    """The logits with one backend alone; with ``ERROR``, with none."""
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # torch says at length why a backend cannot run
        return lm.logits(ids)


def _unless_refused(run: Callable[[], Tensor]) -> Tensor | None:
    """What ``run`` computes; None where its backend cannot run and was asked for."""
    try:
        return run()
    except RuntimeError as error:
        if any(words in str(error) for words in _REFUSALS):
            return None
        raise
