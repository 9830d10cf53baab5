"""How often the diagnosis names a bug in a model that nobody who worked on it had seen.

Five models written from memory (benchmarks/unseen/), and bugs in them whose list was fixed before any was measured, by
somebody who had read the catalogue and none of the experiments, symptoms and planted bugs. As in a report, a class that
needs a part which the module lacks is not named.

    python -m benchmarks.unseen_bugs benchmarks/results/unseen-bugs.json

``--list second`` measures another list, in six other models, which was written later and in the same way,
``--list third`` one more, in seven, and ``--list fourth`` another, in six.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.held_out import ranks
from benchmarks.measuring import PROFILE, measured
from benchmarks.unseen import subject_of
from benchmarks.unseen.bugs import BUGS
from benchmarks.unseen.fourth_bugs import FOURTH_BUGS
from benchmarks.unseen.second_bugs import SECOND_BUGS
from benchmarks.unseen.third_bugs import THIRD_BUGS
from diymodel._files import replace_text
from diymodel.verify import SubjectError
from diymodel.verify.experiments.parts import absent_parts, impossible_classes
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.samples import Sample, read_samples, sample_of
from diymodel.verify.settings import Settings
from diymodel.verify.symptoms import observe

LISTS = {"first": BUGS, "second": SECOND_BUGS, "third": THIRD_BUGS, "fourth": FOURTH_BUGS}


def names(which: str = "first") -> list[str]:
    """The bugs, in the order of the list."""
    return [bug.id for bug in LISTS[which]]


def measure(name: str) -> Sample:
    """What the checks and symptoms say of a bug; nothing, where the model cannot be called with it at all."""
    torch.set_num_threads(1)
    bug = next(bug for bug in itertools.chain(*LISTS.values()) if bug.id == name)
    settings = Settings(PROFILES[PROFILE], shrink=False, optional=False)
    with torch.random.fork_rng():
        subject = subject_of(bug.file, bug.source)
        try:
            subject.convention  # noqa: B018
        except SubjectError:
            return Sample(bug.id, bug.slug, bug.file, {check.id: "skipped" for check in list_checks()}, {})
        results = [verify_one(subject, check, settings) for check in list_checks()]
        sample = sample_of(results, dict(observe(subject, results)), bug.id, bug.slug, bug.file)
        return replace(sample, impossible=impossible_classes(absent_parts(subject, results)))


def with_impossible(samples: list[Sample], text: str) -> str:
    """The text of a file of samples that holds as well what cannot be in each."""
    content = json.loads(text)
    rows = {sample.bug: sorted(sample.impossible) for sample in samples if sample.impossible}
    lines = ",\n".join(f"  {json.dumps(bug)}: {json.dumps(slugs)}" for bug, slugs in rows.items())
    assert list(content)[-1] == "samples"
    head, mark, rest = text.partition(' "samples": [')
    return f'{head} "impossible": {{\n{lines}\n }},\n{mark}{rest}'


def read(text: str) -> list[Sample]:
    """The samples of such a file."""
    impossible = json.loads(text)["impossible"]
    return [replace(sample, impossible=frozenset(impossible.get(sample.bug, ()))) for sample in read_samples(text)]


@dataclass(frozen=True)
class Named:
    """How often the bugs were noticed, and named."""

    bugs: int
    classes: int
    killed: int  # some check fails
    first: int  # the diagnosis names the class first
    three: int  # or among three
    missed: tuple[str, ...]  # those not named first, and what was named


def figures(samples: Iterable[Sample]) -> Named:
    samples = list(samples)
    killed = [sample for sample in samples if sample.killers]
    named = ranks(killed)
    missed = [
        f"{sample.bug}: {', '.join(named[sample.bug]) or 'nothing'}" if sample.killers else f"{sample.bug}: no failure"
        for sample in samples
        if named.get(sample.bug, [])[:1] != [sample.slug]
    ]
    return Named(
        bugs=len(samples),
        classes=len({sample.slug for sample in samples}),
        killed=len(killed),
        first=sum(named[sample.bug][:1] == [sample.slug] for sample in killed),
        three=sum(sample.slug in named[sample.bug] for sample in killed),
        missed=tuple(missed),
    )


def main() -> int:
    samples = measured(__doc__, measure, {which: names(which) for which in LISTS})
    file = Path(sys.argv[1])
    replace_text(file, with_impossible(samples, file.read_text("utf-8")))
    found = figures(samples)
    print("\n".join(found.missed))
    print(f"{found.killed} of {found.bugs} killed; {found.first} named first, {found.three} among three")
    return 0


if __name__ == "__main__":
    sys.exit(main())
