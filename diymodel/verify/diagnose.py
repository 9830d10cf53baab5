"""From the pattern of verdicts and symptoms to the name of the bug.

A class of bugs has several signatures, since it does not look the same in every model: what each known bug of it
showed on the zoo (``samples.json``), their mean, and what checks and symptoms name among their causes. Each gives every
fact, a failed check or a symptom, a probability. A run is the likelier of a class, the better the best of its
signatures explains what was seen, against how often that is seen on bugs of any class. A failure that it does not
explain says little against it, so that of several bugs at once each can be found. A class whose known bugs showed one
or another of the symptoms that point to it is the less likely where those were looked for and none of them showed.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Diagnosis
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.symptoms import list_symptoms

_NAMED = 0.3  # how often a fact is taken to hold on the class that it names first among its causes …
_LEAST_NAMED = 0.1  # … and last
_UNNAMED = 0.02  # and on one that it does not name
_PRIOR = 0.7  # known bugs whose measurement weighs as much as what is taken to be so
_OTHERS = 0.1  # what the mean of a class weighs in the signature of one of its bugs
_SYMPTOM = 2.0  # what a symptom weighs, which is asked to tell classes apart, against a verdict
_MISSED = 0.75  # what it weighs that no symptom of a class showed
_NOT_AMONG_CAUSES = -3.0  # what it says against a class that no failed check names
_UNEXPLAINED = -1.0  # the least that a failure says against a class: it may be another bug's
_NEXT = 0.5  # what the next failed check of an area weighs against the one before
_DOING = 0.4  # how often a fact holds that is taken for the doing of a bug
_BESIDE = 0.9  # share of what the bugs found so far leave unexplained, from which on another one is named beside them
_BESIDE_ALONE = 0.5  # and where one check alone is left, or one that names no other class
_AT_ONCE = 3  # bugs that are told apart
_FITS = 1.0  # log-likelihood ratio below which nothing is said
_UNKNOWN = 3.0  # log-likelihood ratio of a bug of no class; so little is right of a class in two cases of three
_CERTAIN = 0.99

Signature = Mapping[str, float]  # probability of each fact


def facts_of(sample: Sample) -> dict[str, bool]:
    """Checks that failed or passed, and symptoms that showed or did not; what gave no answer says nothing."""
    verdicts = {id: status == "failed" for id, status in sample.verdicts.items() if status in ("passed", "failed")}
    return {**verdicts, **sample.symptoms}


def _failed(sample: Sample) -> list[str]:
    return [id for id, status in sample.verdicts.items() if status == "failed"]


class Signatures:
    """How each class of bugs looks.

    Args:
        samples: what was measured.
        causes: of each check and symptom, by id: the classes it names.
    """

    def __init__(self, samples: Iterable[Sample], causes: Mapping[str, Sequence[str]]) -> None:
        samples, self._causes = list(samples), causes
        known: dict[str, list[Mapping[str, bool]]] = {slug: [] for named in causes.values() for slug in named}
        for sample in samples:
            known.setdefault(sample.slug, []).append(facts_of(sample))
        self._silent = _silences(samples, known)
        unnamed = {fact: _unnamed(fact, known.values()) for fact in causes}
        means = {slug: _mean(bugs, _named(slug, causes, unnamed)) for slug, bugs in known.items()}
        looks = {
            slug: (_named(slug, causes, unnamed), means[slug], *_of_each(bugs, means[slug]))
            for slug, bugs in known.items()
        }
        self._facts = {fact: place for place, fact in enumerate(causes)}
        self._classes = [slug for slug in looks for _ in looks[slug]]  # of each signature
        rates = _table(means.values(), causes).mean(0)
        table = _table((look for group in looks.values() for look in group), causes)
        self._weights = _weights(table, rates, causes)
        self._doing = {slug: {fact for fact in causes if slug in causes[fact]} for slug in looks}
        for slug, often in zip(self._classes, (table >= _DOING).tolist(), strict=True):
            self._doing[slug].update(itertools.compress(causes, often))

    def diagnose(self, sample: Sample) -> list[Diagnosis]:
        """As :meth:`rank`, with bugs that are there at once told apart.

        After the likeliest class stand those that explain what it leaves unexplained, each with its share of the belief
        about that; and its own share is no longer lessened by what they explain.
        """
        ranked = self.rank(sample)
        found, rest = ranked[:1], sample
        while found and len(found) < _AT_ONCE:
            rest = self._without(rest, found[-1:])
            others = [further for further in self.rank(rest) if all(further.bug != one.bug for one in found)]
            if not others or others[0].score < self._least_share(others[0].bug, rest):
                break
            found.append(replace(others[0], beside=True))
        if len(found) > 1:
            alone = self.rank(self._without(sample, found[1:]))
            share = max(one.score for one in (*ranked[:1], *alone) if one.bug == found[0].bug)
            found[0] = replace(found[0], score=share)
        return [*found, *(other for other in ranked if all(other.bug != one.bug for one in found))]

    def _least_share(self, slug: str, rest: Sample) -> float:
        """Of the belief about what is left, from which on a class is named beside another."""
        left = _failed(rest)
        alone = len(left) == 1 or any(tuple(self._causes.get(id, ())) == (slug,) for id in left)
        return _BESIDE_ALONE if alone else _BESIDE

    def _without(self, sample: Sample, found: Iterable[Diagnosis]) -> Sample:
        """The run without what may be the doing of some bugs."""
        seen, ruled_out = facts_of(sample), _ruled_out(sample)
        settled = settled_checks(sample.symptoms)
        doing = {fact for one in found for fact in self._doing[one.bug] - ruled_out.get(one.bug, frozenset())}
        doing |= {id for id, causes in settled.items() if any(one.bug in causes for one in found)}
        doing &= {fact for fact, holds in seen.items() if holds}
        verdicts = {**sample.verdicts, **dict.fromkeys(doing & sample.verdicts.keys(), "skipped")}
        return replace(sample, verdicts=verdicts, symptoms={k: v for k, v in sample.symptoms.items() if k not in doing})

    def rank(self, sample: Sample) -> list[Diagnosis]:
        """Every class that anything speaks for, the one that the run looks most like first; none where nothing fits.

        The scores are shares. What they lack of 1 is that of a bug that is none of these.
        """
        seen = facts_of(sample)
        if not any(seen.values()):
            return []
        silent, ruled_out = _silent_on(sample), _ruled_out(sample)
        named = {slug for id in _failed(sample) for slug in self._causes.get(id, ())}
        fits = {}
        for slug, (score, evidence) in self._best(seen, ruled_out).items():
            if slug in sample.impossible or not evidence:
                continue
            score += self._silent[slug] * silent.get(slug, False) + _NOT_AMONG_CAUSES * (slug not in named)
            fits[slug] = (score, evidence)
        best = max((score for score, _ in fits.values()), default=-math.inf)
        if best < _FITS:
            return []
        total = sum(math.exp(score - best) for score in (_UNKNOWN, *(score for score, _ in fits.values())))
        return [
            Diagnosis(slug, math.exp(score - best) / total, evidence)
            for slug, (score, evidence) in sorted(fits.items(), key=lambda item: (-round(item[1][0], 9), item[0]))
        ]

    def _best(
        self, seen: Mapping[str, bool], ruled_out: Mapping[str, frozenset[str]]
    ) -> dict[str, tuple[float, tuple[str, ...]]]:
        """How well the best signature of each class explains a run, and what of it, the strongest first.

        Checks of one area fail together and are not so many witnesses: each counts half of the one before. Failures
        that are ``ruled_out`` as the doing of a class speak neither for it nor, being another bug's, against it.
        """
        known = [fact for fact in seen if fact in self._facts]
        holds = torch.tensor([seen[fact] for fact in known], dtype=torch.long)
        columns = torch.tensor([self._facts[fact] for fact in known], dtype=torch.long)
        weights = self._weights[holds, :, columns]  # (fact, signature)
        for slug, facts in ruled_out.items():
            here = [place for place, fact in enumerate(known) if fact in facts]
            there = [place for place, other in enumerate(self._classes) if other == slug]
            weights[torch.tensor(here, dtype=torch.long)[:, None], there] = 0.0
        speaking = weights.clamp(min=0) * holds[:, None]
        symptoms = [place for place, fact in enumerate(known) if fact in list_symptoms()]
        scores = (weights - speaking).sum(0) + speaking[symptoms].sum(0)
        for witnesses in _areas(known):
            strongest_first = speaking[witnesses].sort(0, descending=True).values
            scores += _NEXT ** torch.arange(len(witnesses), dtype=torch.float64) @ strongest_first
        best: dict[str, tuple[float, int]] = {}
        for place, (slug, score) in enumerate(zip(self._classes, scores.tolist(), strict=True)):
            best[slug] = max(best.get(slug, (-math.inf, place)), (score, place))
        places = [place for _, place in best.values()]
        evidence = [
            self._evidence(slug, known, row) for slug, row in zip(best, speaking[:, places].T.tolist(), strict=True)
        ]
        return {slug: (score, facts) for (slug, (score, _)), facts in zip(best.items(), evidence, strict=True)}

    def _evidence(self, slug: str, facts: Sequence[str], weights: Sequence[float]) -> tuple[str, ...]:
        """What speaks for a class, the strongest first; a symptom tells a reader something of those it names alone."""
        speaking = [(weight, fact) for weight, fact in zip(weights, facts, strict=True) if weight > 0]
        return tuple(
            fact
            for _, fact in sorted(speaking, key=lambda pair: -pair[0])
            if fact not in list_symptoms() or slug in self._causes[fact]
        )


def _unnamed(fact: str, known: Iterable[Sequence[Mapping[str, bool]]]) -> float:
    """How often a fact is taken to hold on a class that it does not name.

    A check rarely fails. A symptom is looked for only where a failure calls for it: as often as it showed there.
    """
    if fact not in list_symptoms():
        return _UNNAMED
    seen = [bug[fact] for bugs in known for bug in bugs if fact in bug]
    return (sum(seen) + _UNNAMED) / (len(seen) + 1)


def _named(slug: str, causes: Mapping[str, Sequence[str]], unnamed: Signature) -> Signature:
    """What checks and symptoms say of a class."""

    def said(fact: str, named: Sequence[str]) -> float:
        if slug not in named:
            return unnamed[fact]
        return _NAMED - (_NAMED - _LEAST_NAMED) * named.index(slug) / len(named)

    return {fact: said(fact, named) for fact, named in causes.items()}


def _mean(bugs: Sequence[Mapping[str, bool]], said: Signature) -> Signature:
    """What the known bugs of a class showed, begun with what is said of it."""
    mean = {}
    for fact, expected in said.items():
        seen = [bug[fact] for bug in bugs if fact in bug]
        mean[fact] = (sum(seen) + _PRIOR * expected) / (len(seen) + _PRIOR)
    return mean


def _of_each(bugs: Iterable[Mapping[str, bool]], mean: Signature) -> list[Signature]:
    """What one bug showed, softened by what its class shows."""
    return [
        {fact: (bug[fact] + _OTHERS * rate) / (1 + _OTHERS) if fact in bug else rate for fact, rate in mean.items()}
        for bug in bugs
    ]


def _table(signatures: Iterable[Signature], facts: Iterable[str]) -> Tensor:
    """Probabilities (signature, fact)."""
    return torch.tensor([[look[fact] for fact in facts] for look in signatures], dtype=torch.float64)


def _weights(table: Tensor, rates: Tensor, facts: Iterable[str]) -> Tensor:
    """What it says for each signature that a fact does not hold, and that it does, as log-likelihood ratios.

    Args:
        table: probabilities (signature, fact).
        rates: how often a fact holds on bugs of any class, (fact).

    Returns:
        (holds, signature, fact).
    """
    table, rates = (x.clamp(1 - _CERTAIN, _CERTAIN) for x in (table, rates))  # few bugs were measured
    weight = torch.tensor([_SYMPTOM if fact in list_symptoms() else 1.0 for fact in facts], dtype=torch.float64)
    holds_not, holds = ((1 - table) / (1 - rates)).log(), (table / rates).log().clamp(min=_UNEXPLAINED)
    return weight * torch.stack((holds_not, holds))


def _areas(facts: Sequence[str]) -> Iterable[list[int]]:
    """The places of the checks of each area."""
    areas: dict[str, list[int]] = {}
    for place, fact in enumerate(facts):
        if fact not in list_symptoms():
            areas.setdefault(fact.partition(".")[0], []).append(place)
    return areas.values()


# --- symptoms that are missed ----------------------------------------------------------------------------------------


@functools.cache
def _looked_for(check: str) -> frozenset[str]:
    """The symptoms that a failure of a check calls for."""
    found = list_symptoms().values()
    return frozenset(symptom.id for symptom in found if any(fnmatch.fnmatchcase(check, glob) for glob in symptom.when))


def _silent_on(sample: Sample) -> dict[str, bool]:
    """Of the classes whose symptoms were looked for: whether none of them showed."""
    silent: dict[str, bool] = {}
    for id in frozenset().union(*map(_looked_for, _failed(sample))):
        for slug in list_symptoms()[id].causes:
            silent[slug] = silent.get(slug, True) and not sample.symptoms.get(id, False)
    return silent


def _silences(samples: Sequence[Sample], slugs: Iterable[str]) -> dict[str, float]:
    """What it says for each class that its symptoms were looked for and none showed, as a log-likelihood ratio."""
    seen = [(sample.slug, _silent_on(sample)) for sample in samples]

    def ratio(slug: str) -> float:
        of_it = [silent[slug] for known, silent in seen if known == slug and slug in silent]
        of_others = [silent[slug] for known, silent in seen if known != slug and slug in silent]
        rates = [(sum(found) + _PRIOR) / (len(found) + _PRIOR) for found in (of_it, of_others)]
        sure, of_any = (min(max(rate, 1 - _CERTAIN), _CERTAIN) for rate in rates)
        return _MISSED * math.log(sure / of_any)

    return {slug: min(ratio(slug), 0.0) for slug in slugs}


def settled_checks(symptoms: Mapping[str, bool]) -> dict[str, tuple[str, ...]]:
    """The checks whose failure is no other's doing than that of some classes, as experiments showed."""
    shown = (symptom for symptom in list_symptoms().values() if symptoms.get(symptom.id))
    return {id: symptom.causes for symptom in shown for id in symptom.settles}


def _ruled_out(sample: Sample) -> dict[str, frozenset[str]]:
    """Of each class, the checks that fail for another reason, as experiments showed."""
    found: dict[str, frozenset[str]] = {}
    for symptom in list_symptoms().values():
        answer = sample.symptoms.get(symptom.id)
        checks = symptom.settles if answer else symptom.rules_out
        if answer is None or not checks:
            continue
        for slug in _classes() - {*symptom.causes} if answer else symptom.causes:
            found[slug] = found.get(slug, frozenset()).union(checks)
    return found


def known_causes() -> dict[str, tuple[str, ...]]:
    """What every check and symptom names, by its id."""
    return {
        **{check.id: check.causes for check in list_checks()},
        **{symptom.id: symptom.causes for symptom in list_symptoms().values()},
    }


@functools.cache
def _classes() -> frozenset[str]:
    """That any check or symptom names."""
    return frozenset().union(*known_causes().values())


@functools.cache
def signatures() -> Signatures:
    """Learned from the samples that come with the package."""
    return Signatures(read_samples(), known_causes())


@dataclass(frozen=True)
class Accuracy:
    """How often the diagnosis names the class of a bug in a model that it has not learned from."""

    bugs: int  # that some check fails on
    first: int  # whose class came first
    among_three: int
    wrong: tuple[tuple[str, str], ...]  # bug, and the class that came first instead


def leave_one_base_out(samples: Iterable[Sample]) -> Accuracy:
    """Learn from all bases but one, diagnose the bugs of that one; so for every base."""
    samples, causes = list(samples), known_causes()
    first = among_three = bugs = 0
    wrong = []
    for base in sorted({sample.base for sample in samples}):
        known = Signatures([sample for sample in samples if sample.base != base], causes)
        for sample in (sample for sample in samples if sample.base == base and sample.killers):
            named = [found.bug for found in known.diagnose(sample)[:3]]
            bugs += 1
            first += named[:1] == [sample.slug]
            among_three += sample.slug in named
            if named[:1] != [sample.slug]:
                wrong.append((sample.bug, named[0] if named else "none"))
    return Accuracy(bugs, first, among_three, tuple(wrong))
