"""What a module keeps from call to call.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.learning import gradients_to, next_token_loss, trained_call
from diymodel.verify.randomness import reseed
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, distinct_tokens, symptom

_NEW = 2  # tokens to generate
_Call = Callable[[LM, Tensor], Tensor]  # of a module and distinct tokens (B, T)


def _in_training(lm: LM, ids: Tensor) -> Tensor:
    lm.module.train()
    return trained_call(lm, ids)


def _loss(lm: LM, ids: Tensor) -> Tensor:
    return lm.loss(ids, ids.clone())


def _gradient(lm: LM, ids: Tensor) -> Tensor:
    used = [p for p in lm.module.parameters() if p.requires_grad]
    found = gradients_to(next_token_loss(lm, ids), used)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def _cached(lm: LM, ids: Tensor, between: Callable[[], object] = lambda: None) -> Tensor:
    _, past = lm.extend(ids[:, :-1])
    between()
    return lm.extend(ids[:, -1:], past)[0]


def _generated(lm: LM, ids: Tensor) -> Tensor:
    return lm.greedy(ids[:1, :2], _NEW).double()


def _calls(patient: Patient) -> dict[str, _Call]:
    """The kinds of calls that the module takes."""
    needs: dict[str, tuple[str, _Call]] = {
        "loss": ("loss", _loss),
        "gradient": ("graph", _gradient),
        "cached": ("cache", _cached),
        "generated": ("greedy", _generated),
    }
    calls: dict[str, _Call] = {"plain": LM.logits, "training": _in_training}
    return calls | {kind: call for kind, (need, call) in needs.items() if patient.subject.missing(need) is None}


def _run(lm: LM, call: _Call, ids: Tensor) -> Tensor | None:
    """What a call gives that is made in eval mode, or None if it raises."""
    lm.module.eval()
    reseed()
    try:
        return call(lm, ids.clone()).detach().clone()
    except Exception:  # a stranger's module may raise anything
        return None
    finally:
        lm.module.eval()


def _differs(module: LM, call: _Call, other: _Call, ids: Tensor) -> bool:
    """Whether another way to make a call gives something else, or nothing, each in a copy that was never called."""
    expected, seen = (
        _run(LM(copy.deepcopy(module.module), module.config, module.convention), way, ids) for way in (call, other)
    )
    if expected is None or not bool(expected.isfinite().all()):
        return False
    return seen is None or seen.shape != expected.shape or not apart(seen, expected) <= SAME


@symptom(
    "state.earlier_call_matters",
    "a call changes what a later one gives, with the same random numbers",
    "随机数相同，前一次调用却改变了后一次的结果",
    (
        *("causality.*", "batch.*", "forward.*", "decode.*", "loss.*"),
        "gradients.*",
        "modes.*",
        "generation.*",
        "training.*",
    ),
    ("state-survives-calls",),
)
def _earlier_call_matters(patient: Patient) -> bool | None:
    lm, calls = patient.lm(), _calls(patient)
    ids, others = distinct_tokens(lm, rows=2), distinct_tokens(lm, length=LENGTH + 2).flip(1)

    def all_kinds(lm: LM) -> None:
        for call in calls.values():
            _run(lm, call, others[:, :3])
            _run(lm, call, others)

    def after_others(call: _Call, lm: LM, tokens: Tensor) -> Tensor:
        all_kinds(lm)
        reseed()
        return call(lm, tokens)

    if any(_differs(lm, call, partial(after_others, call), ids) for call in calls.values()):
        return True
    if "cached" not in calls or lm.convention.one_timeline or lm.convention.always_cached:
        return False

    def others_between(lm: LM, tokens: Tensor) -> Tensor:
        def between() -> None:
            all_kinds(lm)
            reseed()

        return _cached(lm, tokens, between)

    return _differs(lm, partial(_cached, between=reseed), others_between, ids)


@symptom(
    "state.old_weights_remembered",
    "a call keeps something of the weights: once they change, the module gives something else than one not yet called",
    "调用会把权重里的东西留下来：权重改变之后，它与没调用过的模块结果不同",
    ("training.*", "gradients.*", "state.*", "modes.*"),
    ("tensor-left-behind", "state-survives-calls"),
)
def _old_weights_remembered(patient: Patient) -> bool | None:
    lm = patient.lm()

    def with_other_weights(lm: LM, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in lm.module.parameters():
                parameter.mul_(1.25)
        return lm.logits(tokens)

    def called_before(lm: LM, tokens: Tensor) -> Tensor:
        lm.logits(tokens.clone())
        reseed()
        return with_other_weights(lm, tokens)

    return _differs(lm, with_other_weights, called_before, distinct_tokens(lm))
