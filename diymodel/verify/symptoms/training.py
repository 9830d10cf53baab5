"""Where gradients do not arrive, and what recomputing does to them."""

from __future__ import annotations

import torch
from torch import Tensor

from diymodel.verify.symptoms import ROUTER, SAME, Patient, apart, distinct_tokens, symptom


def _unreached(patient: Patient) -> list[str]:
    """The parameters without a gradient, as the check says."""
    failure = patient.failed["gradients.reach_every_parameter"].failure
    names = (failure.message if failure is not None else "").partition("saw none at ")[2]
    return names.split(", ") if names else []


@symptom(
    "gradients.none_at_the_router",
    "the parameters without a gradient are a router's",
    "没有梯度的是路由器的参数",
    ("gradients.reach_every_parameter",),
    ("router-without-gradient",),
)
def _none_at_the_router(patient: Patient) -> bool | None:
    unreached = _unreached(patient)
    return bool(unreached) and all(ROUTER.search(name) for name in unreached)


@symptom(
    "gradients.path_is_cut",
    "the logits depend on parameters that no gradient leads back to; one of 0 would be another matter",
    "logits 依赖这些参数，却没有梯度能传回去（并不是传回的梯度等于 0）",
    ("gradients.reach_every_parameter",),
    ("gradient-detached",),
)
def _path_is_cut(patient: Patient) -> bool | None:
    lm = patient.lm(num_layers=2, sharpness=1)
    ids, unreached = distinct_tokens(lm), _unreached(patient)
    named = [p for name, p in lm.module.named_parameters() if name in unreached]
    if not named:
        return None
    logits = lm.logits(ids)
    found = torch.autograd.grad(logits.square().sum(), named, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(named, found, strict=True):
            if gradient is None:
                parameter.copy_(parameter.flip(0) * 1.5 + 0.1)
        return apart(lm.logits(ids), logits) > SAME


@symptom(
    "gradients.module_not_called",
    "a module that has parameters is never called",
    "有参数的模块从来没有被调用",
    ("gradients.*", "causality.gradient"),
    ("module-never-called",),
)
def _module_not_called(patient: Patient) -> bool | None:
    lm = patient.lm(num_layers=2)
    called: set[str] = set()
    for name, module in lm.module.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    lm.logits(distinct_tokens(lm)).sum().backward()  # type: ignore[no-untyped-call]
    parts = lm.module.named_modules()
    silent = {name for name, part in parts if any(p.grad is None for p in part.parameters(recurse=False))}
    return bool(silent - called)


@symptom(
    "gradients.cleared_by_a_call",
    "a call takes away the gradients that were there",
    "一次调用就把原有的梯度清掉了",
    ("gradients.accumulate", "training.*"),
    ("gradient-cleared-in-forward",),
)
def _cleared_by_a_call(patient: Patient) -> bool | None:
    lm = patient.lm()

    def sums() -> list[Tensor]:
        return [p.grad.abs().sum() for p in lm.module.parameters() if p.grad is not None]

    for parameter in lm.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = sums()
    calls = [lm.logits, lambda ids: lm.loss(ids, ids)] if patient.subject.missing("loss") is None else [lm.logits]
    for call in calls:
        call(distinct_tokens(lm))
    return [float(part) for part in sums()] != [float(part) for part in before]


@symptom(
    "gradients.right_without_dropout",
    "with dropout 0 gradient checkpointing is right: what is computed again draws other random numbers",
    "dropout 为 0 时梯度检查点是对的：重算时抽到了不同的随机数",
    ("gradients.checkpointing",),
    ("recompute-redraws-dropout",),
)
def _right_without_dropout(patient: Patient) -> bool | None:
    return patient.passes_without_dropout(("gradients.checkpointing",))
