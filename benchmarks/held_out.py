"""How often the diagnosis names a bug in a model that it was not made on: our own, changed in one place.

The diagnosis learns from the zoo, and its symptoms were written against the zoo's bugs. The mutations of our own model,
tests/meta/mutations.py, are neither: what they show is what a stranger's model may expect. On 2026-11-30 four
experiments were mended by what some of them showed: until then 43 came first and 55 among three.

    python -m benchmarks.held_out benchmarks/results/held-out.json --jobs 2
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from benchmarks.measuring import PROFILE, measured
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.diagnose import signatures
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.samples import Sample, sample_of
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.verify.symptoms import observe
from tests.meta.mutations import MUTATIONS

OURS = "ours"


def names() -> list[str]:
    """The mutations that some check must see and that are of a class of the catalogue."""
    classes = {found.slug for found in list_bug_classes()}
    return [mutation.name for mutation in MUTATIONS if mutation.checks and _class(mutation.name) in classes]


def _class(name: str) -> str:
    return name.partition(":")[0]


def measure(name: str) -> Sample:
    """What the checks and symptoms say of our model with a mutation."""
    torch.set_num_threads(1)
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == name)
    settings = Settings(PROFILES[PROFILE], shrink=False, optional=False)
    with mutation.patch(), torch.random.fork_rng():
        subject = resolve(None)
        results = [verify_one(subject, check, settings) for check in list_checks()]
        return sample_of(results, dict(observe(subject, results)), name, _class(name), OURS)


def ranks(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """The three classes that each bug looks most like, the likeliest first."""
    return {sample.bug: [found.bug for found in signatures().diagnose(sample)[:3]] for sample in samples}


def main() -> int:
    samples = measured(__doc__, measure, names())
    named = ranks(samples)
    for sample in samples:
        if named[sample.bug][:1] != [sample.slug]:
            print(f"{sample.bug}: {', '.join(named[sample.bug]) or 'nothing'}")
    first = sum(named[sample.bug][:1] == [sample.slug] for sample in samples)
    print(f"{first} of {len(samples)} first, {sum(s.slug in named[s.bug] for s in samples)} among three")
    return 0


if __name__ == "__main__":
    sys.exit(main())
