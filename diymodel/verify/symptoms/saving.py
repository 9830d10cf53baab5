"""What a module loses on the way to its files, to a copy, or to a larger vocabulary."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diymodel.verify.adapters import LM
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.given import Opened
from diymodel.verify.symptoms import SAME, Patient, apart, distinct_tokens, symptom

_NAMES = re.compile(r"([\w.]+) (missing|left over)")  # in what Opened says of a directory


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


class _UsedParameters(TorchFunctionMode):
    """Notes the parameters that operations are done on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, nn.Parameter):
                self.seen.add(id(value))
        return function(*args, **(kwargs or {}))


def hidden_parameters(lm: LM) -> bool:
    """Whether a call uses parameters that the module does not list."""
    with _UsedParameters() as used:
        lm.logits(distinct_tokens(lm))
    return bool(used.seen - {id(p) for p in lm.module.parameters()})


@symptom(
    "state.hidden_parameters",
    "it computes with parameters that parameters() does not list",
    "计算用到的参数，parameters() 里却没有",
    ("state.*", "gradients.*", "modes.*"),
    ("parameters-unregistered",),
    settles=(
        *("modes.dropout_off_in_eval", "modes.followed_at_every_depth", "forward.deterministic", "state.deepcopy"),
        *("state.depth_adds_parameters", "state.round_trip", "state.moves"),
    ),
)
def _hidden_parameters(patient: Patient) -> bool | None:
    return hidden_parameters(patient.lm())


@symptom(
    "state.copy_uses_the_original",
    "a deep copy still computes with weights of the original",
    "深拷贝出来的模块仍在用原模块的权重计算",
    ("state.*", "gradients.accumulate"),
    ("copy-uses-original",),
)
def _copy_uses_the_original(patient: Patient) -> bool | None:
    lm = patient.lm()
    ids, module, copies = distinct_tokens(lm), lm.module, [copy.deepcopy(lm.module) for _ in range(2)]

    def logits(part: nn.Module) -> Tensor:
        lm.module = part
        return lm.logits(ids.clone()).detach().clone()

    before = logits(copies[0])
    draw_weights(module, seed=2, sharpness=2)
    return apart(logits(copies[1]), before) > SAME


@symptom(
    "checkpoint.runs_code",
    "code in a checkpoint runs when it is loaded",
    "加载 checkpoint 时，里面的代码会被执行",
    ("checkpoint.refuses_code",),
    ("unsafe-unpickling",),
)
def _runs_code(patient: Patient) -> bool | None:
    failure = patient.failed["checkpoint.refuses_code"].failure
    return None if failure is None else "saw it run" in failure.message


@symptom(
    "state.resizing_unties",
    "head and embedding are one tensor, and two once the vocabulary has grown",
    "输出头与 embedding 本是同一个张量，扩词表之后成了两个",
    ("state.resized_vocabulary",),
    ("tie-lost",),
)
def _resizing_unties(patient: Patient) -> bool | None:
    lm = patient.lm(tie_word_embeddings=True)
    resize = getattr(lm.module, "resize_token_embeddings", None)
    if resize is None:
        return None
    before = _shared(lm)
    resize(lm.config.vocab_size + 2)
    return _shared(lm) < before if before else None


def _shared(lm: LM) -> int:
    """How many names are a second one of a parameter."""
    every = lm.module.named_parameters(remove_duplicate=False)
    return len(list(every)) - len(list(lm.module.named_parameters()))


@symptom(
    "state.resizing_loses_rows",
    "once the vocabulary has grown, the logits of the old tokens are others",
    "扩词表之后，旧 token 的 logits 变了",
    ("state.resized_vocabulary",),
    ("resized-head-reinitialised",),
)
def _resizing_loses_rows(patient: Patient) -> bool | None:
    lm = patient.lm()
    resize = getattr(lm.module, "resize_token_embeddings", None)
    if resize is None:
        return None
    ids = distinct_tokens(lm)
    before = lm.logits(ids).detach().clone()
    resize(lm.config.vocab_size + 2)
    return apart(lm.logits(ids), before) > SAME
