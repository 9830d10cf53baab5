"""What generate feeds its own model, step by step.

Shapes: B batch (1), T query length.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.symptoms import Patient, distinct_tokens, symptom

_PROMPT, _NEW = 3, 4
_GENERATION = ("generation.cached_*",)


def _fed(lm: LM, ids: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """What is generated, and what each call of the model was given: tokens, mask, positions, rows of embeddings."""
    calls: list[dict[str, Tensor]] = []
    signature = inspect.signature(lm.module.forward)

    def note_call(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = signature.bind(*inputs, **named).arguments
        names = {"tokens": lm.convention.ids, "mask": lm.convention.mask, "positions": lm.convention.positions}
        values = {role: given.get(name) for role, name in names.items() if name is not None}
        calls.append({role: value for role, value in values.items() if isinstance(value, Tensor)})

    def note_row(name: str, inputs: tuple[Any, ...]) -> None:
        calls[-1][name] = inputs[0]

    token = lm.embedding()
    hooks = [lm.module.register_forward_pre_hook(note_call, with_kwargs=True)]
    for name, part in lm.module.named_modules():
        if isinstance(part, nn.Embedding) and part is not token:
            hooks.append(part.register_forward_pre_hook(lambda _, inputs, name=name: note_row(name, inputs)))
    try:
        return lm.greedy(ids, _NEW), calls
    finally:
        for hook in hooks:
            hook.remove()


def _steps(patient: Patient) -> tuple[Tensor, list[dict[str, Tensor]]] | None:
    """What is generated, and the calls; None unless the prompt comes back, and steps after it take one token each."""
    lm = patient.lm()
    found, calls = _fed(lm, distinct_tokens(lm, length=_PROMPT))
    fed = [call["tokens"].shape[-1] for call in calls if "tokens" in call]
    steps = len(calls) - 1
    return (found, calls) if found.shape[1] == _PROMPT + _NEW and steps and fed == [_PROMPT, *[1] * steps] else None


@symptom(
    "generation.feeds_other_tokens",
    "on its cache, generate feeds another token than the one it has just chosen, or hides one with its mask",
    "generate 在 cache 上送入的不是它刚选出的那个 token，或者用掩码遮住了某个 token",
    _GENERATION,
    ("cached-path-diverges",),
)
def _feeds_other_tokens(patient: Patient) -> bool | None:
    seen = _steps(patient)
    if seen is None:
        return None
    found, (_, *steps) = seen
    hidden = patient.subject.convention.mask_marks_padding
    return any(
        not call["tokens"].flatten().equal(found[:, _PROMPT + step])
        or bool(("mask" in call) and (call["mask"].bool() == hidden).any())
        for step, call in enumerate(steps)
    )


@symptom(
    "generation.positions_do_not_go_on",
    "on its cache, generate gives a token another position than one more than the last",
    "generate 在 cache 上给 token 的位置，不是上一个位置加一",
    _GENERATION,
    ("position-restarts-in-decode", "position-from-kept-length"),
)
def _positions_do_not_go_on(patient: Patient) -> bool | None:
    seen = _steps(patient)
    if seen is None:
        return None
    _, calls = seen
    roles = {role for role in calls[0] if role not in ("tokens", "mask") and all(role in call for call in calls)}
    last = [{role: int(call[role].flatten()[-1]) for role in roles} for call in calls]
    return any(later[role] != before[role] + 1 for before, later in itertools.pairwise(last) for role in roles)
