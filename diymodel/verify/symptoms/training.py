"""Where gradients do not arrive, and what recomputing does to them."""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diymodel.verify.experiments.watchers import Choices
from diymodel.verify.learning import gradients_to
from diymodel.verify.overwritten import says_overwritten
from diymodel.verify.symptoms import ROUTER, SAME, Patient, apart, distinct_tokens, symptom, tells_order

_BACKWARD = (  # checks that take gradients
    "causality.gradient",
    "gradients.absent_tokens_zero",
    "gradients.accumulate",
    "gradients.checkpointing",
    "gradients.finite",
    "gradients.long_row_finite",
    "gradients.reach_every_parameter",
    "loss.gradient",
    "numerics.zeros_finite",
    "training.overfits_a_tiny_batch",
    "training.small_step_lowers_loss",
)
_ONE_PASS = ("causality.gradient", "gradients.reach_every_parameter", "gradients.finite", "loss.gradient")
_DRAWS = 3
_ROWS = 16
_ROUNDED = 16.0  # machine epsilons of the largest gradient: what is smaller is rounding
_PLACES = 29  # positions: more than there are tokens, and no multiple of a width nor near one
_ROOM = 3  # rows that a table of positions has beyond: some begin at 1 or 2


class _Reached(NamedTuple):
    """What gradients reach, over many tokens and several draws of the weights."""

    still: set[str]  # parameters without a gradient beyond rounding
    silent: set[str]  # modules that are never called, and whose own parameters the logits do not depend on
    tables: set[str]  # of positions, a parameter each, that the logits do not depend on, while none tell the order
    chooses: bool  # whether the largest of some numbers are picked, as a router picks experts


def _reached(patient: Patient) -> _Reached:
    called: set[str] = set()
    picked: list[bool] = []
    stills, unuseds = [], []
    for seed in range(_DRAWS + 1):  # an expert that no token chooses in one draw is chosen in another
        lm = patient.lm(num_layers=2, sharpness=1, seed=seed, max_seq_len=_PLACES)
        ids = distinct_tokens(lm, rows=_ROWS)
        if seed == _DRAWS:  # as long as can be, for what acts from one segment of a sequence on the next
            ids = torch.arange(_PLACES)[None].to(ids) % lm.config.vocab_size
        for name, module in lm.module.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        lm.around = partial(Choices, picked)
        lm.logits(ids).square().sum().backward()  # type: ignore[no-untyped-call]
        if lm.convention.labels:  # some parts are called for a loss alone
            with suppress(Exception), torch.no_grad():  # what refuses it is told by other checks
                lm.own_loss(ids, lm.own_labels(ids))
        found = {name: p.grad for name, p in lm.module.named_parameters() if p.requires_grad}
        sizes = {name: 0.0 if gradient is None else float(gradient.abs().max()) for name, gradient in found.items()}
        least = _ROUNDED * torch.finfo(lm.convention.dtype).eps * max(sizes.values())
        stills.append({name for name, size in sizes.items() if size <= least})
        unuseds.append({name for name, gradient in found.items() if gradient is None})
    unused = set.intersection(*unuseds)
    places = range(lm.config.max_seq_len, lm.config.max_seq_len + _ROOM)
    shapes = {name: p.shape for name, p in lm.module.named_parameters()}
    tables = {name for name in unused if len(shapes[name]) > 1 and shapes[name][0] in places}
    if tables:
        one = patient.lm(num_layers=1)  # a second layer would tell the order by what each position has seen
        if tells_order(lambda tokens: one.logits(tokens)[:, -1], distinct_tokens(one)):
            tables = set()  # other positions do: the table is left over
    return _Reached(set.intersection(*stills), {*map(_owner, unused)} - called, tables, bool(picked))


def _owner(parameter: str) -> str:
    """The module that holds it."""
    return parameter.rpartition(".")[0]


@symptom(
    "gradients.none_at_the_router",
    "experts are chosen, and the parameters without a gradient are the router's",
    "专家是选出来的，没有梯度的正是路由器的参数",
    ("gradients.reach_every_parameter",),
    ("router-without-gradient",),
)
def _none_at_the_router(patient: Patient) -> bool | None:
    seen = _reached(patient)
    return seen.chooses and bool(seen.still) and all(ROUTER.search(name) for name in seen.still)


@symptom(
    "gradients.path_is_cut",
    "the logits depend on parameters that no gradient leads back to; one of 0 would be another matter",
    "logits 依赖这些参数，却没有梯度能传回去（并不是传回的梯度等于 0）",
    ("gradients.reach_every_parameter",),
    ("gradient-detached",),
    settles=("gradients.reach_every_parameter",),
)
def _path_is_cut(patient: Patient) -> bool | None:
    lm = patient.lm(num_layers=2, sharpness=1)
    ids, declared = distinct_tokens(lm), patient.subject.no_gradient
    logits = lm.logits(ids)
    if not logits.requires_grad:
        return True
    parameters = {name: p for name, p in lm.module.named_parameters() if p.requires_grad}
    found = gradients_to(logits.square().sum(), list(parameters.values()))
    cut = [
        parameter
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
        if gradient is None and not any(fnmatchcase(name, glob) for glob in declared)
    ]
    with torch.no_grad():
        for parameter in cut:
            parameter.copy_(parameter.flip(0) * 1.5 + 0.1)
        return apart(lm.logits(ids), logits) > SAME


@symptom(
    "gradients.value_overwritten",
    "the backward pass finds that a value which it needs was written over",
    "反向传播发现要用的值已被改写",
    _BACKWARD,
    ("saved-tensor-overwritten",),
    settles=_BACKWARD,
)
def _value_overwritten(patient: Patient) -> bool | None:
    # Between two backward passes an optimizer may have written, to what a graph of an earlier call holds.
    failures = (patient.failed[id].failure for id in _ONE_PASS if id in patient.failed)
    return any(failure is not None and says_overwritten(failure.message) for failure in failures)


@symptom(
    "gradients.module_not_called",
    "a module that has parameters is never called, however many tokens there are",
    "有参数的模块从来没有被调用，无论有多少 token",
    ("gradients.*", "causality.gradient"),
    ("module-never-called",),
)
def _module_not_called(patient: Patient) -> bool | None:
    seen = _reached(patient)
    return bool(seen.silent - {*map(_owner, seen.tables)})


@symptom(
    "gradients.position_table_not_used",
    "a table with a row for each position is never looked at, and nothing else tells the order of the tokens",
    "有一张每个位置一行的表，从来没有被用到，也没有别的东西区分 token 的先后",
    ("gradients.*", "causality.gradient", "sensitivity.*"),
    ("no-positions",),
)
def _position_table_not_used(patient: Patient) -> bool | None:
    seen = _reached(patient)
    return bool(seen.tables) and seen.silent <= {*map(_owner, seen.tables)}


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
