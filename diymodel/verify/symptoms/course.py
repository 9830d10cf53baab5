"""At which of its parts a cached step leaves the course that the whole sequence takes.

Shapes: B batch (1), T query length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.symptoms import LENGTH, SAME, Patient, apart, changed, distinct_tokens, symptom
from diymodel.verify.symptoms.decode import DECODE, beyond_the_window, seen_by_whole

_PREFILL = 2


Part = tuple[str, int]  # its name, and how often it was called before


class _Call(NamedTuple):
    """One call of a part that has no parts."""

    part: Part
    last: Tensor  # what it was given for the last token


class _Course(NamedTuple):
    """What was called, in its order."""

    calls: list[_Call]  # those on as many tokens as were fed: a router's experts get others
    names: set[str]  # of all parts


def _course(lm: LM, length: int, run: Callable[[], Any]) -> _Course:
    """What ``run`` calls, which feeds ``length`` tokens of one row."""
    calls: list[_Call] = []
    counts: Counter[str] = Counter()

    def note(name: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.dim()), None)
        if given is not None and given.numel():
            width = given.shape[-1] if given.is_floating_point() and given.dim() > 1 else 1
            rows = given.detach().reshape(-1, width)
            if len(rows) == length:
                calls.append(_Call((name, counts[name]), rows[-1].clone()))
        counts[name] += 1

    hooks = [
        part.register_forward_pre_hook(lambda _, inputs, named, name=name: note(name, inputs, named), with_kwargs=True)
        for name, part in lm.module.named_modules()
        if not list(part.children())
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return _Course(calls, set(counts))


class _Courses(NamedTuple):
    """The first wrong step's course, the whole sequence's, and that of one that differs in the oldest token seen."""

    module: nn.Module
    step: _Course
    whole: dict[Part, Tensor]
    other: dict[Part, Tensor]
    names: set[str]  # of the parts that whole sequences call

    def agrees(self, call: _Call) -> bool:
        """Whether this is what the part is given in the whole sequence."""
        return apart(call.last.double(), self.whole[call.part].double()) <= SAME

    def mixed(self, call: _Call) -> bool:
        """Whether the oldest token that the logits depend on enters into it, as from attention on."""
        return apart(self.other[call.part].double(), self.whole[call.part].double()) > SAME

    def known(self) -> list[_Call]:
        """The step's calls that every whole sequence has as well."""
        return [call for call in self.step.calls if call.part in self.whole and call.part in self.other]


def _courses(patient: Patient) -> _Courses | None:
    """None where no step is wrong, or the prefill is."""
    lm = patient.lm()
    ids = distinct_tokens(lm)
    if beyond_the_window(patient):
        return None
    with torch.no_grad():  # as the steps
        expected = [lm.logits(ids[:, :end])[:, -1] for end in range(1, LENGTH + 1)]
        logits, past = lm.extend(ids[:, :_PREFILL])
        if not apart(logits[:, -1], expected[_PREFILL - 1]) <= SAME:
            return None
        for t in range(_PREFILL, LENGTH):
            seen: list[Any] = []
            step = _course(lm, 1, lambda: seen.extend(lm.extend(ids[:, t : t + 1], past)))  # noqa: B023
            logits, past = seen
            if not apart(logits[:, -1], expected[t]) <= SAME:
                return _beside_whole(lm, step, ids[:, : t + 1])
    return None


def _beside_whole(lm: LM, step: _Course, ids: Tensor) -> _Courses:
    """The course of a step beside those of whole sequences."""
    oldest = next(t for t, far in enumerate(seen_by_whole(lm, ids)) if far > SAME)
    other = changed(ids, oldest)
    one, two = (_course(lm, ids.shape[1], partial(lm.logits, tokens)) for tokens in (ids, other))
    return _Courses(lm.module, step, dict(one.calls), dict(two.calls), one.names | two.names)


@symptom(
    "decode.takes_other_parts",
    "a cached step calls other parts of the model than the whole sequence does",
    "用 cache 解码时调用的模块与整段计算时不同",
    DECODE,
    ("cached-path-diverges",),
)
def _takes_other_parts(patient: Patient) -> bool | None:
    found = _courses(patient)
    if found is None:
        return None
    weighty = {name for name, part in found.module.named_modules() if list(part.parameters())}  # a cache is none
    always = {name for name, _ in found.whole.keys() & found.other.keys()}
    return bool(weighty & ((always - found.step.names) | (found.step.names - found.names)))


@symptom(
    "decode.embeds_another_position",
    "a cached step looks up another row of an embedding than the whole sequence does for this token",
    "用 cache 解码时，这个 token 查的 embedding 行与整段计算时不同",
    DECODE,
    ("position-restarts-in-decode", "position-from-kept-length"),
)
def _embeds_another_position(patient: Patient) -> bool | None:
    found = _courses(patient)
    if found is None:
        return None
    parts = dict(found.module.named_modules())
    return any(isinstance(parts[call.part[0]], nn.Embedding) and not found.agrees(call) for call in found.known())


@symptom(
    "decode.wrong_before_attention",
    "a cached step goes wrong before the token meets others",
    "用 cache 解码时，在 token 与其他 token 发生联系之前就已经错了",
    DECODE,
    ("cached-path-diverges", "position-restarts-in-decode", "position-from-kept-length"),
)
def _wrong_before_attention(patient: Patient) -> bool | None:
    found = _courses(patient)
    if found is None:
        return None
    return any(not found.mixed(call) and not found.agrees(call) for call in found.known())
