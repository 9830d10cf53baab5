"""What a module keeps from call to call, writes to, loses on the way to its files, or never uses.

Shapes: B batch, T query length.
"""

from __future__ import annotations

import copy
import re

from torch import Tensor

from diymodel.verify.adapters import Opened
from diymodel.verify.randomness import reseed
from diymodel.verify.symptoms import ROUTER, SAME, Patient, apart, distinct_tokens, symptom

_NAMES = re.compile(r"([\w.]+) (missing|left over)")  # in what Opened says of a directory


@symptom(
    "state.earlier_call_matters",
    "a call changes what the next one gives, with the same random numbers",
    "随机数相同，前一次调用却改变了后一次的结果",
    ("causality.*", "batch.*", "forward.*", "decode.*"),
    ("state-survives-calls",),
)
def _earlier_call_matters(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm)
    module = lm.module

    def logits(before: Tensor | None) -> Tensor:
        lm.module = copy.deepcopy(module)
        if before is not None:
            lm.logits(before)
        reseed()
        return lm.logits(ids)

    return apart(logits(ids.flip(1)), logits(None)) > SAME


@symptom(
    "inputs.written",
    "the token ids are others after the call",
    "调用之后，传入的 token id 变了",
    ("causality.*", "batch.*", "forward.*", "loss.*"),
    ("inputs-written-in-place",),
)
def _inputs_written(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids = distinct_tokens(lm, rows=2)
    before = ids.clone()
    lm.logits(ids)
    return not ids.equal(before)


def _files(patient: Patient) -> tuple[set[str], set[str]] | None:
    """The names that the files lack, and those that are too many."""
    if patient.subject.directory is None:
        return None
    found = _NAMES.findall("; ".join(Opened(*patient.subject.directory()).problems))
    return {name for name, what in found if what == "missing"}, {name for name, what in found if what != "missing"}


@symptom(
    "files.names_have_a_prefix",
    "names in the files are the model's with something before them",
    "文件里的名字比模型的多了一段前缀",
    ("directory.complete",),
    ("wrapper-prefix-keys",),
)
def _names_have_a_prefix(patient: Patient) -> bool | None:
    found = _files(patient)
    if found is None:
        return None
    missing, left_over = found
    return any(name.endswith(f".{lacking}") for name in left_over for lacking in missing)


@symptom(
    "files.lack_the_head_only",
    "the files lack the head and nothing else",
    "文件里只缺输出头",
    ("directory.complete",),
    ("tie-lost",),
)
def _lack_the_head_only(patient: Patient) -> bool | None:
    found = _files(patient)
    if found is None:
        return None
    missing, left_over = found
    return len(missing) == 1 and "head" in next(iter(missing)) and not left_over


@symptom(
    "gradients.none_at_the_router",
    "the parameters without a gradient are a router's",
    "没有梯度的是路由器的参数",
    ("gradients.reach_every_parameter",),
    ("router-without-gradient",),
)
def _none_at_the_router(patient: Patient) -> bool | None:
    failure = patient.failed["gradients.reach_every_parameter"].failure
    unreached = (failure.message if failure is not None else "").partition("saw none at ")[2]
    return bool(unreached) and all(ROUTER.search(name) for name in unreached.split(", "))


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
