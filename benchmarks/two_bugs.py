"""How well the diagnosis tells two bugs apart that one model has at once.

Pairs of bugs of the zoo, drawn at random, both put into the model that they share; the diagnosis has learned from the
other models alone.

    python -m benchmarks.two_bugs benchmarks/results/two-bugs.json --jobs 2
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.measuring import PROFILE, measured
from diymodel.verify import SubjectError
from diymodel.verify.diagnose import Signatures, known_causes
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.samples import Sample, read_samples, sample_of
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject
from diymodel.verify.symptoms import observe
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import Bug, list_bugs

A_BASE = 4  # pairs drawn for each model
_AND = " + "


@functools.cache
def pairs() -> tuple[tuple[Bug, Bug], ...]:
    """Bugs of different classes whose changes can both be made: the same each time, and mostly so in a larger zoo."""
    return tuple(pair for base in BASES for pair in itertools.islice(_of(base), A_BASE))


def _of(base: str) -> Iterator[tuple[Bug, Bug]]:
    bugs = sorted((bug for bug in list_bugs() if bug.base == base), key=lambda bug: bug.id)  # wherever it is written
    every = [pair for pair in itertools.combinations(bugs, 2) if pair[0].slug != pair[1].slug]
    for one, other in sorted(every, key=_by_chance):
        try:
            subject(one, other)
        except (ValueError, SyntaxError):  # the one changes what the other changes
            continue
        yield one, other


def _by_chance(pair: tuple[Bug, Bug]) -> bytes:
    return hashlib.sha256(_AND.join(bug.id for bug in pair).encode()).digest()


def subject(one: Bug, other: Bug) -> Subject:
    """The model with both.

    Raises:
        ValueError: the second finds its place no more.
        SyntaxError: what comes out is no Python.
    """
    source = other.put_into(one.source)
    made = BASES[one.base].subject(source, f"zoo:{one.base}+{one.slug}+{other.slug}", (*one.claims, *other.claims))
    made.reference = one.subject().reference or other.subject().reference
    return made


def measure(index: int) -> Sample:
    """What the checks and symptoms say of a pair; nothing, where what comes out cannot be called at all."""
    torch.set_num_threads(1)
    one, other = pairs()[index]
    found, settings = subject(one, other), Settings(PROFILES[PROFILE], shrink=False, optional=False)
    names = f"{one.id}{_AND}{other.id}", f"{one.slug}{_AND}{other.slug}", one.base
    try:
        found.convention  # noqa: B018
    except SubjectError:
        return Sample(*names, {check.id: "skipped" for check in list_checks()}, {})
    results = [verify_one(found, check, settings) for check in list_checks()]
    return sample_of(results, dict(observe(found, results)), *names)


@dataclass(frozen=True)
class Apart:
    """How often both bugs are named."""

    pairs: int  # that some check fails on
    one_first: int
    both_first: int  # they are the first two
    among_three: int
    missed: tuple[str, ...]  # pairs of which the first three lack one, and the three


def tell_apart(samples: Iterable[Sample]) -> Apart:
    """The diagnosis of each pair by what was learned from the other models."""
    known, causes = read_samples(), known_causes()
    samples = [sample for sample in samples if sample.killers]
    found = Apart(0, 0, 0, 0, ())
    for base, group in itertools.groupby(sorted(samples, key=lambda sample: sample.base), lambda sample: sample.base):
        learned = Signatures([sample for sample in known if sample.base != base], causes)
        for sample in group:
            named, both = [one.bug for one in learned.diagnose(sample)[:3]], set(sample.slug.split(_AND))
            missed = () if both <= set(named) else (f"{sample.bug}: {', '.join(named) or 'nothing'}",)
            found = replace(
                found,
                pairs=found.pairs + 1,
                one_first=found.one_first + (not both.isdisjoint(named[:1])),
                both_first=found.both_first + (both == set(named[:2])),
                among_three=found.among_three + (both <= set(named)),
                missed=found.missed + missed,
            )
    return found


def main() -> int:
    samples = measured(__doc__, measure, range(len(pairs())))
    found = tell_apart(samples)
    print("\n".join(found.missed))
    print(
        f"{found.pairs} pairs: one of the two first {found.one_first}, both first {found.both_first}, "
        f"both among three {found.among_three}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
