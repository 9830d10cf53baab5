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

from diymodel.verify.report import Failure, Result

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
    traits: Mapping[str, tuple[str, ...]]  # of each failure, as traits_of

    @property
    def killers(self) -> tuple[str, ...]:
        """The checks that failed."""
        return tuple(id for id, status in self.verdicts.items() if status in ("failed", "error"))


def sample_of(results: Iterable[Result], bug: str = "", slug: str = "", base: str = "") -> Sample:
    """What a run saw."""
    results = list(results)
    return Sample(
        bug,
        slug,
        base,
        {result.check.id: result.status for result in results},
        {result.check.id: traits_of(result.failure) for result in results if result.failure is not None},
    )


def traits_of(failure: Failure) -> tuple[str, ...]:
    """What the smallest example of a failure needs that smaller ones would have had.

    A shrunk example with two layers says that one layer does not show the bug.
    """
    config, values = failure.config, failure.values
    heads, kv_heads = config.get("num_heads", 1), config.get("num_kv_heads") or config.get("num_heads", 1)
    found = {
        "raises": failure.traceback is not None,
        "layers": config.get("num_layers", 1) > 1,
        "heads": heads > 1,
        "grouped": kv_heads < heads,
        "dropout": config.get("dropout", 0) > 0,
        "tied": bool(config.get("tie_word_embeddings")),
        "rows": _rows(values) > 1,
        "longer": _length(values) > 2,
    }
    return tuple(name for name, holds in found.items() if holds)


def _rows(values: Mapping[str, Any]) -> int:
    tokens = values.get("tokens")
    return values.get("rows") or (len(tokens) if isinstance(tokens, list) else 1)


def _length(values: Mapping[str, Any]) -> int:
    tokens = values.get("tokens")
    drawn = max((len(row) for row in tokens if isinstance(row, list)), default=0) if isinstance(tokens, list) else 0
    return values.get("length") or drawn


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
            {id: tuple(traits) for id, traits in row["traits"].items()},
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
            "traits": {id: list(traits) for id, traits in sample.traits.items() if traits},
        }
        for sample in samples
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({**facts, "checks": checks}, indent=1).removesuffix("\n}")
    return f'{head},\n "samples": [\n{lines}\n ]\n}}\n'
