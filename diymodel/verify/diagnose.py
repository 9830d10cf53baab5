"""From the pattern of verdicts and symptoms to the name of the bug.

Each class of bugs has a signature: how often each check fails on it and how often each symptom shows, as measured on
the zoo (``samples.json``); before that, what checks and symptoms name among their causes. A class is the likelier, the
more its signature explains of what was seen, against the rate at which that is seen on bugs of any class (a naive
Bayes classifier). A failure that it does not explain counts for nothing, so that of several bugs at once each can be
found.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Diagnosis
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.symptoms import list_symptoms

EXPLAINED = 0.3  # a class explains a failure that it shows at least as often
_NAMED = 0.7  # how often a fact is taken to hold on a class that it names first among its causes …
_LEAST_NAMED = 0.4  # … and last
_UNNAMED = 0.02  # on a class that it does not name
_PRIOR = 0.7  # bases whose measurement weighs as much as what is taken to be so
_UNEXPLAINED = -1.0  # the least that a failure says against a class: it may be another bug's
_SYMPTOM = 4.0  # what a symptom weighs, which is asked to tell classes apart, against a verdict
_FITS = 2.0  # log-likelihood ratio below which nothing is said


def facts_of(sample: Sample) -> dict[str, bool]:
    """Checks that failed or passed, and symptoms that showed or did not; what gave no answer says nothing."""
    verdicts = {id: status == "failed" for id, status in sample.verdicts.items() if status in ("passed", "failed")}
    return {**verdicts, **sample.symptoms}


class Signatures:
    """How often each fact holds on each class of bugs.

    Args:
        samples: what was measured.
        causes: of each check and symptom, by id: the classes it names, the likeliest first.
    """

    def __init__(self, samples: Iterable[Sample], causes: Mapping[str, Sequence[str]]) -> None:
        seen: dict[tuple[str, str], list[bool]] = defaultdict(list)
        slugs = {slug for named in causes.values() for slug in named}
        for sample in samples:
            slugs.add(sample.slug)
            for fact, holds in facts_of(sample).items():
                seen[sample.slug, fact].append(holds)
        self.slugs = sorted(slugs)
        self._probability: dict[str, dict[str, float]] = {}  # by fact and slug
        self._weights: dict[str, dict[str, tuple[float, float]]] = {}  # where the fact does not hold, and where it does
        for fact, named in causes.items():
            known = {slug: _probability(seen.get((slug, fact), []), slug, named) for slug in self.slugs}
            rate = sum(known.values()) / len(known)
            self._probability[fact] = known
            self._weights[fact] = {slug: _weights(fact, known[slug], rate) for slug in self.slugs}

    def probability(self, slug: str, fact: str) -> float:
        """Of a fact on a bug of class ``slug``."""
        return self._probability[fact][slug]

    def rank(self, sample: Sample) -> list[Diagnosis]:
        """Every class, the one that the run looks most like first; none where nothing failed or nothing fits."""
        facts = {fact: holds for fact, holds in facts_of(sample).items() if fact in self._weights}
        if not any(facts.values()):
            return []
        scores = {slug: sum(self._weights[fact][slug][facts[fact]] for fact in facts) for slug in self.slugs}
        best = max(scores.values())
        if best < _FITS:
            return []
        total = sum(math.exp(score - best) for score in scores.values())
        return [
            Diagnosis(slug, math.exp(scores[slug] - best) / total, self._evidence(slug, facts))
            for slug in sorted(scores, key=lambda slug: (-scores[slug], slug))
        ]

    def _evidence(self, slug: str, facts: Mapping[str, bool]) -> tuple[str, ...]:
        speaking = [fact for fact, holds in facts.items() if holds and self._weights[fact][slug][True] > 0]
        return tuple(sorted(speaking, key=lambda fact: -self._weights[fact][slug][True]))


def _probability(seen: Sequence[bool], slug: str, named: Sequence[str]) -> float:
    expected = _UNNAMED
    if slug in named:
        expected = _NAMED - (_NAMED - _LEAST_NAMED) * named.index(slug) / len(named)
    return (sum(seen) + _PRIOR * expected) / (len(seen) + _PRIOR)


def _weights(fact: str, probability: float, rate: float) -> tuple[float, float]:
    """What it says for the class that a fact does not hold, and that it does, as log-likelihood ratios."""
    weight = _SYMPTOM if fact in list_symptoms() else 1.0
    return weight * math.log((1 - probability) / (1 - rate)), weight * max(math.log(probability / rate), _UNEXPLAINED)


def known_causes() -> dict[str, tuple[str, ...]]:
    """What every check and symptom names, by its id."""
    return {
        **{check.id: check.causes for check in list_checks()},
        **{symptom.id: symptom.causes for symptom in list_symptoms().values()},
    }


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
            named = [found.bug for found in known.rank(sample)[:3]]
            bugs += 1
            first += named[:1] == [sample.slug]
            among_three += sample.slug in named
            if named[:1] != [sample.slug]:
                wrong.append((sample.bug, named[0] if named else "none"))
    return Accuracy(bugs, first, among_three, tuple(wrong))
