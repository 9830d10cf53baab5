"""What a call makes for itself lies where its input does."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, said
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial
from diymodel.verify.two_devices import Apart, TwoDevices

_LONGEST = 4  # tokens, which leave room for new ones


@check(
    "state.makes_on_device",
    title="what a call makes for itself, such as positions and masks, is on the device of its input",
    step="4.2",
    causes=("tensor-left-behind",),
)
def makes_on_device(trial: Trial) -> None:
    lm = trial.model(dropout=0.5)
    ids = trial.tokens(lm, 2, _LONGEST)
    refusals = [_refusal(how, call) for how, call in _calls(trial, lm, ids).items()]
    if all(refusals):
        raise NotApplicable(refusals[0])


def _refusal(how: str, call: Callable[[], object]) -> str | None:
    """What a stranger's module says against a call; None: it runs on another device."""
    try:
        with TwoDevices(made=True):
            call()
    except Apart as apart:
        raise CheckFailure(
            f"on another device than the CPU, {how} must make its tensors there, saw {apart.operation} given one "
            f"{apart.origin}, which is on the CPU: name the device, as in torch.arange(T, device=input_ids.device)"
        ) from apart
    except SubjectError:
        raise
    except Exception as error:  # a stranger's module may do anything with a device
        return f"{how} ends in an error of its own: {said(error)}"
    return None


def _calls(trial: Trial, lm: LM, ids: Tensor) -> dict[str, Callable[[], object]]:
    """The ways in which the module can be called, by what they are called in a message."""

    def trained() -> Tensor:
        lm.module.train()
        return lm.logits(ids) if trial.missing("loss") else lm.loss(ids, ids)

    def continued() -> None:
        _, past = lm.extend(ids[:, :-1])
        lm.extend(ids[:, -1:], past)

    ways = {
        "a call": ("", lambda: lm.logits(ids)),
        "a cached step": ("cache", continued),
        "greedy generation": ("greedy", lambda: lm.greedy(ids, 2)),
        "sampling": ("sampling", lambda: lm.sample(ids, 2, 0)),
        "a call in training": ("", trained),
    }
    return {how: call for how, (needed, call) in ways.items() if not needed or trial.missing(needed) is None}
