"""Symptoms: small experiments on a module that failed, which tell one bug from another that fails the same checks.

Each asks one question of the module as it is, without its code: which tokens a logit depends on, which formula a loss
is, whether a failing trial passes once an operation is repaired. The answers are facts for the diagnosis.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import itertools
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis.errors import HypothesisDeprecationWarning
from torch import Tensor

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM, Around
from diymodel.verify.calling.outputs import Output
from diymodel.verify.convention import CachedEntry
from diymodel.verify.experiments.repairs import RepairOf
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.randomness import reseed, seeded
from diymodel.verify.report import Result
from diymodel.verify.subject import Subject
from diymodel.verify.timing import OutOfTime, time_limit
from diymodel.verify.trial import Trial

LENGTH = 6
SAME = 1e-9  # of the largest logit: what is nearer is the same
ROUTER = re.compile(r"router|switch|gate(?!_proj)", re.IGNORECASE)  # what people call it
_SECONDS = 20  # for one symptom
_WIDE = {  # no unit is so alone that a norm hides what it says
    "vocab_size": 16,
    "hidden_size": 8,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 8,
    "max_seq_len": 16,
    "dropout": 0.0,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


class _Repeatable(LM):
    """Each call begins with the same random numbers: what a dropout that goes on does is no effect of a token."""

    def _call(self, inputs: Mapping[str, Any], start: int = 0, entry: CachedEntry | None = None) -> Output:
        reseed()
        return super()._call(inputs, start, entry)


def _wide_ones() -> Iterator[dict[str, Any]]:
    """Configurations to try in turn: few modules know fewer heads of keys, some only tied weights or larger heads."""
    for size, tied, kv_heads in itertools.product((8, 16), (False, True), (_WIDE["num_kv_heads"], _WIDE["num_heads"])):
        yield {**_WIDE, "hidden_size": size, "tie_word_embeddings": tied, "num_kv_heads": kv_heads}


class Patient:
    """A subject that failed, with what its failures showed."""

    def __init__(self, subject: Subject, failed: Mapping[str, Result], device: str = "cpu") -> None:
        self.subject = subject
        self.failed = failed
        self.device = device

    def lm(self, sharpness: int = 2, seed: int = 1, **fixed: Any) -> LM:
        """A module with few layers and sharp weights; of a failing configuration where the subject refuses others."""
        failed = [(result.check, result.failure) for result in self.failed.values() if result.failure is not None]
        configs = [failure.config for _, failure in failed]
        needs = frozenset.intersection(*(frozenset(check.needs) for check, _ in failed))
        trial = Trial(self.subject, None, dtype=self.subject.convention.dtype_for(needs), device=self.device)
        wide = ({**config, "num_layers": self._layers} for config in _wide_ones())
        for config in (*wide, {**configs[0], "dropout": 0.0}):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", HypothesisDeprecationWarning)  # of a trial that is refused
                    lm = trial.build(DIYConfig.from_dict({**config, **fixed}), seed, sharpness)
                return _Repeatable(lm.module, lm.config, lm.convention)
            except Exception as error:  # a stranger's constructor may raise anything
                refusal = error
        raise refusal

    @functools.cached_property
    def _layers(self) -> int:
        """One, whose answers are the easiest to read, unless every check needs more to fail."""
        failed = [result for result in self.failed.values() if result.failure is not None]
        fewest: int = min(result.failure.config.get("num_layers", 1) for result in failed)  # type: ignore[union-attr]
        is_given = fewest == 1 or "num_layers" in self.subject.own_sizes
        return 1 if is_given or any(map(self._fails_with_one_layer, failed)) else fewest

    def _fails_with_one_layer(self, result: Result) -> bool:
        try:
            return not self.passes_now(result, config={"num_layers": 1})
        except NotApplicable:
            return False
        except Exception:  # a stranger's module may raise anything
            return True

    def passes_under(self, repair: RepairOf, ids: Iterable[str]) -> bool | None:
        """Whether the failing trials of these checks pass under a repair; None where one passes without it as well."""
        return self._all_pass(ids, repair)

    def passes_without_dropout(self, ids: Iterable[str]) -> bool | None:
        """Whether the failing trials of these checks pass with dropout 0; None where one passes as it is."""
        return self._all_pass(ids, None, dropout=0.0)

    def _all_pass(self, ids: Iterable[str], around: Around | None, **fixed: Any) -> bool | None:
        known = [result for id, result in self.failed.items() if id in ids and result.failure is not None]
        if not known or any(self.passes_now(result) for result in known):
            return None
        return all(self.passes_now(result, around, config=fixed) for result in known)

    def passes_now(
        self, result: Result, around: Around | None = None, config: Mapping[str, Any] | None = None, **changed: Any
    ) -> bool:
        """Whether the failing trial of a check passes now.

        Args:
            around: what its calls happen in.
            config: fields of its configuration that are changed.
            changed: others of its values.
        """
        assert result.failure is not None
        values = {**result.failure.values, **changed}
        if config:
            values["config"] = {**values["config"], **config}
        trial = Trial.replaying(self.subject, values, self.device)
        trial.around = around
        try:
            trial.run(result.check.function)
        except CheckFailure:
            return False
        return True


@dataclass(frozen=True)
class Symptom:
    """One question, and which bugs a yes speaks for."""

    id: str
    yes: str  # what a yes means, as evidence
    yes_zh: str
    when: tuple[str, ...]  # globs: asked where one of these checks failed
    causes: tuple[str, ...]  # slugs that a yes points to
    ask: Callable[[Patient], bool | None]
    rules_out: tuple[str, ...]  # checks whose failures are none of the causes' doing where the answer is no
    settles: tuple[str, ...]  # and checks whose failures are no other's doing where it is yes


_SYMPTOMS: dict[str, Symptom] = {}


def symptom(
    id: str,
    yes: str,
    yes_zh: str,
    when: Iterable[str],
    causes: Iterable[str],
    rules_out: Iterable[str] = (),
    settles: Iterable[str] = (),
) -> Callable[[Callable[[Patient], bool | None]], Callable[[Patient], bool | None]]:
    """Register the decorated question."""

    def register(ask: Callable[[Patient], bool | None]) -> Callable[[Patient], bool | None]:
        assert id not in _SYMPTOMS, id
        _SYMPTOMS[id] = Symptom(id, yes, yes_zh, tuple(when), tuple(causes), ask, tuple(rules_out), tuple(settles))
        return ask

    return register


@functools.cache
def list_symptoms() -> dict[str, Symptom]:
    """All of them by id, in the order in which they are asked."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(_SYMPTOMS)


def observe(subject: Subject, results: Iterable[Result], device: str = "cpu") -> Iterator[tuple[str, bool]]:
    """The answers to the questions that the failures raise, with their ids, as they come.

    Those that the module cannot answer are left out.
    """
    failed = {result.check.id: result for result in results if result.status == "failed"}
    if not any(result.failure is not None for result in failed.values()):
        return
    patient = Patient(subject, failed, device)
    for found in list_symptoms().values():
        if not any(fnmatch.fnmatchcase(id, glob) for id in failed for glob in found.when):
            continue
        try:
            with seeded(), time_limit(_SECONDS):
                answer = found.ask(patient)
        except (Exception, OutOfTime):  # the module is broken: that it raises or hangs here says nothing more
            continue
        if answer is not None:
            yield found.id, answer


# --- what the experiments share --------------------------------------------------------------------------------------


def distinct_tokens(lm: LM, rows: int = 1, length: int = LENGTH) -> Tensor:
    """Distinct tokens in each row (B, T)."""
    generator = torch.Generator().manual_seed(3)
    rows_of = [torch.randperm(lm.config.vocab_size, generator=generator)[:length] for _ in range(rows)]
    return torch.stack(rows_of).to(lm.device)


def changed(ids: Tensor, position: int) -> Tensor:
    """The tokens of distinct ones (B, T) with a neighbour's at a position."""
    other = ids.clone()
    other[:, position] = ids[:, position - 1]
    return other


def apart(seen: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    scale = float(other.detach().abs().max())
    return float((seen - other).detach().abs().max()) / scale if scale else 0.0


def tells_order(logits: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
    """Whether exchanging two earlier tokens changes logits, such as the last."""
    exchanged = ids.clone()
    exchanged[:, 1:3] = ids[:, 1:3].flip(1)
    return apart(logits(exchanged), logits(ids)) > SAME


def influence(logits: Callable[[Tensor], Tensor], ids: Tensor) -> list[float]:
    """How far changing each token moves what ``logits`` gives."""
    plain = logits(ids)
    return [apart(logits(changed(ids, position)), plain) for position in range(ids.shape[1])]
