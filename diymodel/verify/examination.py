"""What is done with a module that failed: experiments, and what they and the verdicts mean, written into the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import NamedTuple

from diymodel.verify.child import Child
from diymodel.verify.experiments.parts import absent_parts, impossible_classes
from diymodel.verify.report import Report, Result
from diymodel.verify.samples import sample_of
from diymodel.verify.subject import Subject
from diymodel.verify.surroundings import surroundings
from diymodel.verify.symptoms import observe

_SECONDS = 120.0  # for all experiments in a child
_SHOWN = 5  # classes of bugs that a report names


class Findings(NamedTuple):
    """What experiments on a module that failed have shown."""

    symptoms: Mapping[str, bool] = MappingProxyType({})
    absent: frozenset[str] = frozenset()  # parts that it lacks


def examine(subject: Subject, results: Sequence[Result], device: str = "cpu") -> Iterator[Findings]:
    """What is known of a module that failed after each of the experiments, the last time after all."""
    found = Findings({}, absent_parts(subject, results, device))
    yield found
    for id, answer in observe(subject, results, device):
        found = found._replace(symptoms={**found.symptoms, id: answer})
        yield found


def examine_isolated(subject: Subject, results: Sequence[Result], device: str = "cpu") -> Iterator[Findings]:
    """As :func:`examine`, in a child of its own; no more than what was found before that crashes or hangs."""

    def work(connection: Connection) -> None:
        for found in examine(subject, results, device):
            connection.send(found)

    yield Findings()
    until = time.monotonic() + _SECONDS
    with Child(work) as child, contextlib.suppress(EOFError):
        while child.connection.poll(max(until - time.monotonic(), 0.0)):
            yield child.connection.recv()


@surroundings()
def diagnose(report: Report, subject: Subject, isolate: bool = False) -> None:
    """Look for symptoms, write the likeliest bugs into the report, and order the causes of each failure by them.

    A run that was cut short is diagnosed by its verdicts alone: its reader wants no more experiments. Where most checks
    end in the same error, the error says it all.
    """
    from diymodel.verify.diagnose import settled_checks, signatures

    if report.raises_everywhere:
        return
    found = Findings()
    if not report.interrupted:
        look = examine_isolated if isolate else examine
        *_, found = look(subject, report.results, report.device)
    report.symptoms, impossible = found.symptoms, impossible_classes(found.absent)
    ranked = signatures().diagnose(replace(sample_of(report.results, report.symptoms), impossible=impossible))
    report.diagnosis = tuple(ranked[:_SHOWN])
    likely = {found.bug for found in report.likely}
    settled = settled_checks(found.symptoms)
    explained = {fact for found in report.likely for fact in found.evidence}
    explained |= {id for id, causes in settled.items() if not likely.isdisjoint(causes)}
    report.unexplained = tuple(
        result.check.id
        for result in report.failed
        if result.check.id not in explained and likely.isdisjoint(result.check.causes)
    )
    places = {found.bug: place for place, found in enumerate(report.likely)}

    def ordered(result: Result) -> Result:
        if result.failure is None:
            return result
        named = (found for place, found in enumerate(ranked) if not place or found.beside)
        sure = {found.bug for found in named if found.score > 0.5 and result.check.id in found.evidence}
        shown = settled.get(result.check.id, ())
        listed = (*shown, *result.failure.likely_causes, *sorted(sure))  # in the check's own order where none is ranked
        possible = dict.fromkeys(slug for slug in listed if slug not in impossible)
        causes = sorted(possible, key=lambda slug: (slug not in shown, places.get(slug, len(places))))
        return replace(result, failure=replace(result.failure, likely_causes=tuple(causes)))

    report.results = [ordered(result) for result in report.results]
