"""What the checks say of bugs that are known: measured on the zoo, and what a diagnosis is learned from.

A sample is what one run sees of one bug. The file has one line a sample; its verdicts are one letter a check, in the
order of the file's list of checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from diymodel.verify.report import Result

_LETTERS = {
    "passed": ".",
    "failed": "F",
    "error": "E",
    "skipped": "-",
    "inconclusive": "?",
}
_STATUS = {letter: status for status, letter in _LETTERS.items()}


@dataclass(frozen=True)
class Sample:
    """What one run of the checks saw of one bug."""

    bug: str  # its id
    slug: str  # its class
    base: str  # the model it stands in
    verdicts: Mapping[str, str]  # status by check id
    symptoms: Mapping[str, bool]  # answers of verify/symptoms/, by id
    impossible: frozenset[str] = frozenset()  # classes that need a part which the module lacks; not kept in the file

    @property
    def killers(self) -> tuple[str, ...]:
        """The checks that failed."""
        return tuple(id for id, status in self.verdicts.items() if status in ("failed", "error"))


def sample_of(
    results: Iterable[Result], symptoms: Mapping[str, bool], bug: str = "", slug: str = "", base: str = ""
) -> Sample:
    """What a run saw. Where the subject raised, or no cause is named, no bug is told from another: that is an error."""

    def status(result: Result) -> str:
        failure = result.failure
        return "error" if failure is not None and (failure.traceback or not failure.likely_causes) else result.status

    return Sample(bug, slug, base, {result.check.id: status(result) for result in results}, dict(symptoms))


def read_samples(text: str | None = None) -> list[Sample]:
    """The samples of a file's text; None: those that come with the package."""
    if text is None:
        text = resources.files("diymodel.verify").joinpath("samples.json").read_text(encoding="utf-8")
    content = json.loads(text)
    checks = content["checks"]
    return [
        Sample(
            row["bug"],
            row["slug"],
            row["base"],
            {id: _STATUS[letter] for id, letter in zip(checks, row["verdicts"], strict=True)},
            row["symptoms"],
        )
        for row in content["samples"]
    ]


def write_samples(samples: Sequence[Sample], facts: Mapping[str, Any]) -> str:
    """The text of a file with these samples; ``facts`` say how they were measured."""
    checks = list(samples[0].verdicts) if samples else []
    rows = [
        {
            "bug": sample.bug,
            "slug": sample.slug,
            "base": sample.base,
            "verdicts": "".join(_LETTERS[sample.verdicts[id]] for id in checks),
            "symptoms": dict(sample.symptoms),
        }
        for sample in samples
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({**facts, "checks": checks}, indent=1).removesuffix("\n}")
    return f'{head},\n "samples": [\n{lines}\n ]\n}}\n'
