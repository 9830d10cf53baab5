"""A module computes the same wherever it was built and whatever it was moved through."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.casting import cast
from diymodel.verify.checks.tied import shared
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, first_of, said
from diymodel.verify.left_behind import left_behind
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

# A buffer that went through float32 is rounded, and is not in a module that did not; of the largest logit.
_ROUNDED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1 / 16, torch.bfloat16: 1 / 16}


@check(
    "state.moves",
    title="a module that was moved to another dtype or device computes what one built there does",
    step="4.2",
    causes=("tensor-left-behind", "complex-table-cast"),
)
def moves(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    built = lm.twin()
    ids = trial.tokens(lm)
    lm.logits(ids)  # what a module sets up on its first call has to move as well
    if stayed := left_behind(lm.twin(), ids):
        raise CheckFailure(
            f"moved to another device, a module must take all its tensors along, saw the call break on "
            f"{first_of(stayed)}, left behind: use register_buffer(…, persistent=False)"
        )
    refusals = []
    places = [(trial.device, torch.float32), (trial.device, trial.dtype), (trial.device, torch.float16)]
    if trial.device != "cpu":
        places += [("cpu", trial.dtype), (trial.device, trial.dtype)]
    for device, dtype in places:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of imaginary parts that are dropped: it fails for them
            _move(lm.module, device, dtype)
        there = built.twin()
        cast(there.module, dtype, device)
        if lost := [name for name, tensor in _complex(there).items() if name not in _complex(lm)]:
            raise CheckFailure(
                f"moved to {dtype} on {device}, the buffer {lost[0]} must stay complex, saw it real: to(dtype) drops "
                "imaginary parts, and without them a table of rotary positions turns nothing"
            )
        _same_parameters(there, lm)
        expected = _logits(there, ids.to(device))
        if not isinstance(expected, Tensor):
            refusals.append(f"moved to {dtype} on {device}, the module does not run: {expected}")
            continue
        if not bool(expected.isfinite().all()):
            continue  # nor does it compute anything there, however it got there
        what = f"moved to {dtype} on {device}, the logits must be those of a module built there"
        seen = _logits(lm, ids.to(device))
        if not isinstance(seen, Tensor):
            raise CheckFailure(f"{what}, saw {seen}")
        if seen.dtype != expected.dtype:
            raise CheckFailure(f"{what}, of {expected.dtype}, saw {seen.dtype}")
        seen, expected = seen.detach(), expected.detach()
        worst, tolerance = float((seen - expected).abs().max()), _ROUNDED[dtype] * float(expected.abs().max())
        if not worst <= tolerance:
            raise CheckFailure(f"{what}, saw a difference of {worst:.3g}", worst, tolerance)
    if len(refusals) == len(places):
        raise NotApplicable(refusals[0])


def _move(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    """``module.to(device, dtype)``, or one after the other where its own ``to`` takes a single thing to go to."""
    taken = inspect.signature(module.to).parameters
    if {"device", "dtype"} <= taken.keys():
        module.to(device=device, dtype=dtype)
    elif any(parameter.kind is parameter.VAR_POSITIONAL for parameter in taken.values()):
        module.to(device, dtype)
    else:
        module.to(dtype)
        module.to(device)


def _complex(lm: LM) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in lm.module.named_buffers() if buffer.is_complex()}


@torch.no_grad()
def _same_parameters(to: LM, source: LM) -> None:
    for parameter, other in zip(to.module.parameters(), source.module.parameters(), strict=True):
        parameter.copy_(other)


@torch.no_grad()
def _logits(lm: LM, ids: Tensor) -> Tensor | str:
    """Or what a stranger's module says against them."""
    try:
        return lm.logits(ids)
    except SubjectError:
        raise
    except Exception as error:
        return said(error)


@check(
    "state.meta_device",
    title="a module built on the meta device, given memory and loaded, gives the same logits bit for bit",
    step="4.2",
    needs=("meta_init",),
    causes=("buffers-uninitialised", "state-outside-checkpoint"),
)
def meta_device(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    what = "built on the meta device, given memory and loaded, a module must give the same logits bit for bit"
    try:
        with torch.device("meta"):
            module = trial.subject.build(lm.config)
        module = cast(module, trial.dtype).to_empty(device=trial.device)
        module.eval()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # new memory may by chance hold what stood there before
        module.load_state_dict(lm.module.state_dict())
        seen = LM(module, lm.config, lm.convention).logits(ids)
    except SubjectError:
        raise
    except Exception as error:  # whatever a stranger's module raises
        lm.logits(ids)  # which raises by itself where the meta device is not at fault
        raise CheckFailure(f"{what}, saw {said(error)}") from error
    trial.identical(seen, lm.logits(ids), what)


@check(
    "state.resized_vocabulary",
    title="a larger vocabulary changes no logit of the old tokens, and is saved and loaded",
    step="4.2",
    causes=("resized-head-reinitialised", "tie-lost"),
)
def resized_vocabulary(trial: Trial) -> None:
    lm = trial.model()
    resize = getattr(lm.module, "resize_token_embeddings", None)
    if resize is None:
        raise NotApplicable("the module has no resize_token_embeddings()")
    ids = trial.tokens(lm)
    old = lm.config.vocab_size
    size = old + trial.draw("added", st.integers(1, 3))
    before, groups = lm.logits(ids).detach().clone(), shared(lm.module)
    plain = {"mean_resizing": False} if "mean_resizing" in inspect.signature(resize).parameters else {}
    try:
        resize(size, **plain)
    except NotImplementedError as error:
        raise NotApplicable(f"resize_token_embeddings is refused: {said(error)}") from error
    wider = LM(lm.module, replace(lm.config, vocab_size=size), lm.convention)
    seen = wider.logits(ids)
    if seen.shape[-1] != size:
        raise CheckFailure(f"with {size} tokens there must be as many logits, saw {seen.shape[-1]}")
    what = f"with {size} tokens instead of {old}, the logits of the old ones must be what they were"
    trial.same(seen[..., :old], before, what, wider, lambda: wider.logits(ids))
    if shared(lm.module) != groups:
        raise CheckFailure(f"{' and '.join(groups[0])} are one parameter and must be one with {size} tokens, saw two")
    loaded = trial.fresh(wider.config)
    what = f"the state dict of a module with {size} tokens instead of {old} must load into one built with {size}"
    try:
        loaded.module.load_state_dict(lm.module.state_dict())
    except (RuntimeError, ValueError) as error:
        raise CheckFailure(f"{what}, saw {said(error)}") from error
    trial.identical(loaded.logits(ids), seen, f"{what} and give the same logits bit for bit")
