"""What a module has: a bug cannot be in a part that is not there.

A class of bugs says in the catalogue which parts it ``needs``. Each part has one question of the module, which is
answered with yes where it cannot be told.

Shapes: B batch, T query length, S key length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.calling.outputs import read_output
from diymodel.verify.calling.signature import called, told_parameters
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.experiments.watchers import AttentionWeights, Choices, ExponentialsOfPairs
from diymodel.verify.experiments.watchers_of_places import NOISE, Calls, Operand, PlaceOperands
from diymodel.verify.held import tensors_of
from diymodel.verify.learning import trained_call
from diymodel.verify.randomness import seeded
from diymodel.verify.report import Result
from diymodel.verify.subject import Subject
from diymodel.verify.symptoms import SAME, Patient, distinct_tokens, influence
from diymodel.verify.symptoms.decode import cached_last, seen_by_whole
from diymodel.verify.symptoms.watched import later, weights_of
from diymodel.verify.timing import OutOfTime, time_limit

_SECONDS = 20  # for one part
_LENGTH = 7  # as much as nothing else is
_LONGEST = 13
_ROWS = 3
_NO_ROUND_NUMBER = 13  # of tokens
_LAYERS = 8  # so that every kind of layer is among them
_TURNS = {"cos", "sin", "polar", "cos_", "sin_"}
_SOFTMAXES = {"softmax", "flex_attention", "logsumexp"}
_DROPS = {"dropout", "dropout_", "native_dropout", "alpha_dropout", "feature_dropout", "rand", "rand_like"}
_DROPS |= {"bernoulli", "bernoulli_", "new_empty.bernoulli_", *NOISE}

Has = Callable[[Patient], bool]


def absent_parts(subject: Subject, results: Iterable[Result], device: str = "cpu") -> frozenset[str]:
    """Those that the module lacks, for certain."""
    failed = {result.check.id: result for result in results if result.status == "failed"}
    if not any(result.failure is not None for result in failed.values()):
        return frozenset()
    patient = Patient(subject, failed, device)
    return frozenset(name for name, has in PARTS.items() if not _has(has, patient))


def impossible_classes(absent: Iterable[str]) -> frozenset[str]:
    """The classes of bugs that need what is absent."""
    absent = frozenset(absent)
    return frozenset(found.slug for found in list_bug_classes() if absent.intersection(found.needs))


def _has(has: Has, patient: Patient) -> bool:
    try:
        with seeded(), time_limit(_SECONDS):
            return has(patient)
    except (Exception, OutOfTime):  # the module is broken, and nothing is certain
        return True


# --- what is computed ------------------------------------------------------------------------------------------------


def _place_operands(patient: Patient) -> tuple[list[Operand], set[str]]:
    """What goes into sums and products by its place alone, and the names of all operations, building included."""
    calls = Calls()
    with calls:
        lm = patient.lm(num_layers=_LAYERS)
    seen: list[list[Operand]] = []
    for ids in (distinct_tokens(lm, length=_LENGTH), distinct_tokens(lm, length=_LENGTH).roll(1, 1)):
        seen.append([])
        lm.around = partial(PlaceOperands, seen[-1], calls.names)
        lm.logits(ids)
    one, other = seen
    if len(one) != len(other):
        raise ValueError("other tokens are computed with other operations")
    alike = [a for a, b in zip(one, other, strict=True) if a.same(b)]
    return alike, calls.names


def _turns(patient: Patient) -> bool:
    """Whether activations may be multiplied by numbers that their place decides, as a rotation does."""
    found, names = _place_operands(patient)
    return bool(names & _TURNS) or any(operand.multiplies for operand in found)


def _weighs_distances(patient: Patient) -> bool:
    """Whether something that the place decides is added to scores (…, T, T), as ALiBi is."""
    found, names = _place_operands(patient)
    return "flex_attention" in names or any(not o.multiplies and o.on_scores for o in found)


def _drops(patient: Patient) -> bool:
    """Whether anything may be drawn at random in training."""
    lm = patient.lm(num_layers=_LAYERS, dropout=0.5)
    if any(isinstance(part, torch.nn.modules.dropout._DropoutNd) for part in lm.module.modules()):
        return True
    calls = Calls()
    lm.around = lambda start, length: calls
    lm.logits(distinct_tokens(lm))
    lm.module.train()
    trained_call(lm, distinct_tokens(lm))
    return bool(calls.names & _DROPS) or calls.drops


def _attends(patient: Patient) -> bool:
    """Whether scores become weights by a softmax over keys."""
    calls = Calls()
    seen: list[Tensor] = []
    by_hand: list[bool] = []
    lm = patient.lm(num_layers=_LAYERS)
    for around in (partial(AttentionWeights, seen), partial(ExponentialsOfPairs, by_hand), lambda start, length: calls):
        lm.around = around
        lm.logits(distinct_tokens(lm, length=_LENGTH))
    block_by_block = bool(by_hand) and "maximum" in calls.names  # of the scores so far
    return bool(seen) or any(by_hand) or block_by_block or bool(calls.names & _SOFTMAXES)


def _routes(patient: Patient) -> bool:
    lm = patient.lm(num_layers=_LAYERS)
    seen: list[bool] = []
    lm.around = partial(Choices, seen)
    lm.logits(distinct_tokens(lm))
    return bool(seen)


# --- what is seen, and kept ------------------------------------------------------------------------------------------


def _forgets(patient: Patient) -> bool:
    """Whether a token of the past may be out of sight, in the whole sequence or on a cache: a window, an eviction."""
    lm = patient.lm(sharpness=1)
    ids = distinct_tokens(lm, length=lm.config.max_seq_len)
    if min(seen_by_whole(lm, ids)) <= SAME:
        return True
    if patient.subject.missing("cache") is None and min(influence(cached_last(lm, 1, 1), ids)) <= SAME:
        return True
    deep = patient.lm(sharpness=1, num_layers=_LAYERS)
    weights = weights_of(deep, lambda: deep.logits(ids))
    return any(bool((w[..., ~later(w)] == 0).any()) for w in weights)


def _keeps_fewer(patient: Patient) -> bool:
    """Whether a cache may hold fewer tokens than came: some are out of sight, or were padding."""
    return any(id.startswith("padding.") for id in patient.failed) or _forgets(patient)


def _carries(patient: Patient) -> bool:
    """Whether a cache holds anything of a size that is neither that of the tokens seen nor of all that it can hold."""
    lm = patient.lm(num_layers=_LAYERS, max_seq_len=_LONGEST)
    ids = distinct_tokens(lm, _ROWS, _LENGTH)
    if lm.convention.cache_on_module:
        return True

    def shapes(length: int) -> list[tuple[int, ...]]:
        cache = lm.extend(ids[:, :length])[1]
        return [tuple(x.shape) for x in tensors_of(lm, cache) if x.is_floating_point() and x.dim() > 2]

    short, long = _LENGTH - 2, _LENGTH
    before, after = shapes(short), shapes(long)
    if not before or len(before) != len(after):
        return True
    pairs = ((zip(a, b, strict=False)) for a, b in zip(before, after, strict=True))
    return not all(any((a, b) in ((short, long), (_LONGEST, _LONGEST)) for a, b in pair) for pair in pairs)


# --- what is taken ---------------------------------------------------------------------------------------------------


def _takes_anything(patient: Patient) -> bool:
    """Whether ``forward`` takes arguments of any name."""
    parameters = told_parameters(called(patient.lm().module)).values()
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)


def _lacks_no(*capabilities: str) -> Has:
    return lambda patient: any(patient.subject.missing(capability) is None for capability in capabilities)


def _takes_positions(patient: Patient) -> bool:
    return patient.subject.convention.positions is not None


def _set_in_failures(role: str, check: str) -> Has:
    """Whether generate takes a setting, and a check that failed gives it."""

    def given(patient: Patient) -> bool:
        generating = patient.subject.convention.generating
        if generating is None or role not in generating.names:
            return False
        return check in patient.failed or role in generating.greedy

    return given


def _has_logits_to_spare(patient: Patient) -> bool:
    """Whether forward has logits for more tokens than there are, of a number that nobody rounds to."""
    lm = patient.lm(vocab_size=_NO_ROUND_NUMBER)
    returned: list[Any] = []
    with lm.module.register_forward_hook(lambda module, given, output: returned.append(output)):
        lm.logits(distinct_tokens(lm))
    found = [read_output(output, _NO_ROUND_NUMBER).logits for output in returned]
    return any(logits is not None and logits.shape[-1] > _NO_ROUND_NUMBER for logits in found) or not found


def _in_several_rows(patient: Patient) -> bool:
    """Whether any failure that one cache for all rows could explain is of more than one row.

    Where rows are reordered there are always several: that fails as well where a single one is wrong.
    """
    named = [result for result in patient.failed.values() if "cache-rows-shared" in result.check.causes]
    rows = [None if result.failure is None else result.failure.values.get("rows", 0) for result in named]
    drawn = [number for number in rows if number != 0]
    return any(number != 1 for number in drawn) if drawn else bool(named)


PARTS: dict[str, Has] = {
    "logits_to_spare": _has_logits_to_spare,
    "several_rows": _in_several_rows,
    "rotation": _turns,
    "distance_bias": _weighs_distances,
    "dropout": _drops,
    "attention": _attends,
    "router": _routes,
    "window": _forgets,
    "kept_fewer": _keeps_fewer,
    "carried_state": _carries,
    "further_arguments": _takes_anything,
    "padding": _lacks_no("padding", "left_padding", "generate_padded"),
    "padded_prompts": _lacks_no("generate_padded"),
    "positions": _takes_positions,
    "temperature": _set_in_failures("temperature", "generation.temperature_zero"),
    "top_k": _set_in_failures("top_k", "generation.top_k"),
    "top_p": _set_in_failures("top_p", "generation.top_p"),
}
