"""Who changes the mode of a module, and who does not follow."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom
from diymodel.verify.symptoms.saving import hidden_parameters

DROPS = ("batch.*", "causality.*", "forward.*", "loss.*", "decode.*", "modes.*", "generation.*")  # what dropout breaks
_LOSS = ("loss.value", "loss.micro_batches_add_up")
_GREEDY = ("generation.greedy_is_argmax",)
_STOPS = ("generation.eos_per_row",)
_DECODES = (
    "decode.branch",
    "decode.cached_equals_full",
    "decode.chunks",
    "decode.long_row",
    "decode.reset",
    "decode.rows_reordered",
    "decode.session",
    "decode.unrelated_call",
)
_MODES = ("modes.*", "generation.restores_mode", "generation.ignores_training_mode")


def modes_of(module: nn.Module) -> dict[str, bool]:
    """Whether each part is in training mode."""
    return {name: part.training for name, part in module.named_modules()}


@symptom(
    "modes.parts_stay_behind",
    "train() and eval() do not reach every part",
    "train() 和 eval() 没有传到所有部件",
    (*DROPS, "training.*", "gradients.*"),
    ("mode-not-restored",),
)
def _parts_stay_behind(patient: Patient) -> bool | None:
    module = patient.lm().module
    for mode in (True, False):
        module.train(mode)
        if set(modes_of(module).values()) != {mode}:
            return True
    return False


@symptom(
    "modes.call_turns_training_on",
    "a call in eval mode leaves parts in training mode",
    "在 eval 模式下调用一次之后，有部件变成了训练模式",
    DROPS,
    ("mode-not-restored",),
)
def _call_turns_training_on(patient: Patient) -> bool | None:
    lm = patient.lm()
    lm.module.eval()
    if any(modes_of(lm.module).values()):
        return None
    ids, missing = distinct_tokens(lm), patient.subject.missing
    calls: dict[str, Callable[[], object]] = {
        "loss": lambda: lm.loss(ids, ids),
        "cache": lambda: lm.extend(ids[:, -1:], lm.extend(ids[:, :-1])[1]),
        "generate": lambda: lm.generate(ids[:, :2], 2),
    }
    made = [lambda: lm.logits(ids), *(call for need, call in calls.items() if missing(need) is None)]
    for call in made:
        lm.module.eval()
        parts = list(lm.module.modules())  # a cache may become a new one
        call()
        if any(part.training for part in parts):
            return True
    return False


@symptom(
    "modes.generate_leaves_eval",
    "generate leaves a module that trains in eval mode, as no other call does",
    "训练中的模块调用 generate 之后停在了 eval 模式，而其他调用不会这样",
    _MODES,
    ("mode-not-restored",),
)
def _generate_leaves_eval(patient: Patient) -> bool | None:
    if patient.subject.missing("generate") is not None:
        return None
    lm = patient.lm()
    lm.module.train()
    lm.logits(distinct_tokens(lm))
    if not all(modes_of(lm.module).values()):
        return None
    lm.generate(distinct_tokens(lm)[:, :2], 2)
    return not all(modes_of(lm.module).values())


@symptom(
    "modes.generate_trains",
    "generate calls a module that trains in training mode",
    "训练中的模块，generate 在里面仍以训练模式调用它",
    ("generation.*",),
    ("mode-not-restored",),
)
def _generate_trains(patient: Patient) -> bool | None:
    if patient.subject.missing("generate") is not None or patient.subject.missing("generate_eval") is not None:
        return None
    lm = patient.lm()
    lm.module.train()
    seen: set[bool] = set()
    lm.module.register_forward_pre_hook(lambda module, _: seen.update(modes_of(module).values()))
    lm.generate(distinct_tokens(lm)[:, :2], 2)
    return True in seen


@symptom(
    "modes.right_with_dropout_0",
    "with dropout 0 in the configuration the failing trial passes",
    "配置里的 dropout 为 0 时，失败的例子就通过了",
    _LOSS,
    ("mode-not-restored", "dropout-active-in-eval", "mode-flag-copied"),
)
def _right_with_dropout_0(patient: Patient) -> bool | None:
    return _passes_without_dropout(patient, _LOSS)


@symptom(
    "modes.generates_rightly_with_dropout_0",
    "with dropout 0 in the configuration generate keeps to the likeliest tokens",
    "配置里的 dropout 为 0 时，generate 生成的就是概率最大的 token",
    _GREEDY,
    ("mode-not-restored", "dropout-active-in-eval", "mode-flag-copied"),
    rules_out=_GREEDY,
)
def _generates_rightly_with_dropout_0(patient: Patient) -> bool | None:
    return _right_without_dropout(patient, _GREEDY)


@symptom(
    "modes.stops_rightly_with_dropout_0",
    "with dropout 0 in the configuration each row stops at its own end token",
    "配置里的 dropout 为 0 时，每一行都停在自己的结束 token 上",
    _STOPS,
    ("mode-not-restored", "dropout-active-in-eval", "mode-flag-copied"),
    rules_out=_STOPS,
)
def _stops_rightly_with_dropout_0(patient: Patient) -> bool | None:
    return _right_without_dropout(patient, _STOPS)


@symptom(
    "modes.decodes_rightly_with_dropout_0",
    "with dropout 0 in the configuration decoding on a cache is right",
    "配置里的 dropout 为 0 时，用 cache 解码是对的",
    _DECODES,
    ("mode-not-restored", "dropout-active-in-eval", "mode-flag-copied"),
    rules_out=_DECODES,
)
def _decodes_rightly_with_dropout_0(patient: Patient) -> bool | None:
    return _right_without_dropout(patient, _DECODES)


def _right_without_dropout(patient: Patient, checks: tuple[str, ...]) -> bool | None:
    if any(hasattr(part, "running_mean") for part in patient.lm().module.modules()):
        return None  # the mode decides about more than dropout
    return _passes_without_dropout(patient, checks)


def _passes_without_dropout(patient: Patient, checks: tuple[str, ...]) -> bool | None:
    """None where eval() does not reach some parts because the module does not know of them."""
    return None if hidden_parameters(patient.lm()) else patient.passes_without_dropout(checks)
