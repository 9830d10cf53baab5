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

from diymodel.verify.registry import list_checks
from diymodel.verify.report import Diagnosis
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.symptoms import SYMPTOMS

_NAMED = 0.7  # how often a fact is taken to hold on a class that it names first among its causes …
_LEAST_NAMED = 0.4  # … and last
_UNNAMED = 0.04  # on a class that it does not name
_SYMPTOM = 2.0  # what a symptom weighs, which is asked to tell classes apart, against a verdict
_SAYING = ("passed", "failed", "error")
_PRIOR = 0.7  # bases whose measurement weighs as much as what is taken to be so
_FITS = 2.0  # log-likelihood ratio below which nothing is said


def facts_of(sample: Sample) -> dict[str, bool]:
    """Checks that failed or passed, and symptoms that showed or did not; what gave no answer says nothing."""
    verdicts = {id: status != "passed" for id, status in sample.verdicts.items() if status in _SAYING}
    return {**verdicts, **sample.symptoms}


class Signatures:
    """How often each fact holds on each class of bugs.

    Args:
        samples: what was measured.
        causes: of each check and symptom, by id: the classes it names, the likeliest first.
    """

    def __init__(self, samples: Iterable[Sample], causes: Mapping[str, Sequence[str]]) -> None:
        self.causes = causes
        self._seen: dict[tuple[str, str], list[bool]] = defaultdict(list)
        slugs = {slug for named in causes.values() for slug in named}
        for sample in samples:
            slugs.add(sample.slug)
            for fact, holds in facts_of(sample).items():
                self._seen[sample.slug, fact].append(holds)
        self.slugs = sorted(slugs)
        self._rates = {fact: self._rate(fact) for fact in causes}

    def rank(self, sample: Sample) -> list[Diagnosis]:
        """Every class, the one that the run looks most like first; none where nothing failed or nothing fits."""
        facts = {fact: holds for fact, holds in facts_of(sample).items() if fact in self.causes}
        if not any(facts.values()):
            return []
        weights = {slug: {fact: self._weight(slug, fact, facts[fact]) for fact in facts} for slug in self.slugs}
        scores = {slug: sum(parts.values()) for slug, parts in weights.items()}
        best = max(scores.values())
        if best < _FITS:
            return []
        total = sum(math.exp(score - best) for score in scores.values())
        return [
            Diagnosis(slug, math.exp(scores[slug] - best) / total, _evidence(weights[slug], facts))
            for slug in sorted(scores, key=lambda slug: (-scores[slug], slug))
        ]

    def probability(self, slug: str, fact: str) -> float:
        """Of a fact on a bug of class ``slug``."""
        seen = self._seen.get((slug, fact), [])
        return (sum(seen) + _PRIOR * self._expected(slug, fact)) / (len(seen) + _PRIOR)

    def _expected(self, slug: str, fact: str) -> float:
        causes = self.causes[fact]
        if slug not in causes:
            return _UNNAMED
        return _NAMED - (_NAMED - _LEAST_NAMED) * causes.index(slug) / len(causes)

    def _rate(self, fact: str) -> float:
        return sum(self.probability(slug, fact) for slug in self.slugs) / max(len(self.slugs), 1)

    def _weight(self, slug: str, fact: str, holds: bool) -> float:
        """What one fact says for the class, as a log-likelihood ratio."""
        probability, rate = self.probability(slug, fact), self._rates[fact]
        weight = _SYMPTOM if fact in SYMPTOMS else 1.0
        if holds:
            return weight * max(math.log(probability / rate), 0.0)
        return weight * math.log((1 - probability) / (1 - rate))


def _evidence(weights: Mapping[str, float], facts: Mapping[str, bool]) -> tuple[str, ...]:
    speaking = [fact for fact, holds in facts.items() if holds and weights[fact] > 0]
    return tuple(sorted(speaking, key=lambda fact: -weights[fact]))


def known_causes() -> dict[str, tuple[str, ...]]:
    """What every check and symptom names, by its id."""
    return {
        **{check.id: check.causes for check in list_checks()},
        **{symptom.id: symptom.causes for symptom in SYMPTOMS.values()},
    }


@functools.cache
def signatures() -> Signatures:
    """Learned from the samples that come with the package."""
    return Signatures(read_samples(), known_causes())
