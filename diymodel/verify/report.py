"""The outcome of a verification: what is kept of every check, the text for a person, the document for a program."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diymodel.verify.registry import Check

Lang = Literal["en", "zh"]
Status = Literal["passed", "failed", "skipped", "inconclusive", "expected_failure", "error"]
Lead = Literal["beside", "instead", ""]  # how a diagnosis follows on the ones before

_LEAST_SCORE = 0.02  # of a diagnosis that is shown beside a likelier one
_NUMBER = re.compile(r"\d+")
_ERROR = re.compile(r"\w+Error: ")
_FITS_WELL = 0.5  # from which share of the belief on the likeliest is more than the nearest


@dataclass(frozen=True)
class Failure:
    """A refutation, shrunk: what was wrong, on which smallest example, and how to see it again."""

    message: str
    likely_causes: tuple[str, ...]
    config: dict[str, Any]
    values: dict[str, Any]  # everything drawn, by name
    reproduce: str  # the command that replays it
    max_abs_diff: float | None = None
    tolerance: float | None = None
    traceback: str | None = None  # the subject's own frames, where it raised

    @property
    def expected_and_seen(self) -> tuple[str, str]:
        """The two halves of the message; all of it, and nothing, where the subject raised."""
        expected, _, seen = self.message.partition(", saw ")
        return expected, seen

    @property
    def raised_at(self) -> str:
        """The innermost of the subject's own frames; none: ''."""
        return (self.traceback or "").rpartition('  File "')[2]


@dataclass(frozen=True)
class Result:
    """The verdict of one check."""

    check: Check
    status: Status
    examples: int = 0
    seconds: float = 0.0
    reason: str | None = None  # why it was skipped, inconclusive, expected to fail, or could not run
    failure: Failure | None = None


@dataclass(frozen=True)
class Diagnosis:
    """A class of bugs that a run looks like."""

    bug: str  # slug
    score: float  # share of the belief among all classes; the facts are not independent, so it ranks, and is no odds
    evidence: tuple[str, ...]  # ids of failed checks and of symptoms that speak for it, the strongest first
    beside: bool = False  # another bug than those before it; the score is its share of what they leave unexplained


@dataclass
class Report:
    """All verdicts of one run, in the order of the roadmap."""

    subject: str
    seed: int = 0
    profile: str = "standard"
    torch: str = ""
    device: str = "cpu"
    dtype: str = "float64"
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    refused: tuple[str, ...] = ()  # configurations that the subject could not build
    interrupted: str | None = None  # why some checks were not run
    cancelled: bool = False  # whether that was Ctrl-C
    called: str = ""  # how the subject was called
    symptoms: Mapping[str, bool] = field(default_factory=dict)  # answers of verify/symptoms/
    diagnosis: tuple[Diagnosis, ...] = ()  # the likeliest first; none where nothing failed, or nothing fits
    unexplained: tuple[str, ...] = ()  # failed checks that no likely bug of the diagnosis explains
    left_out: tuple[str, ...] = ()  # capabilities that could not be tried because of an error: cache, loss, generate

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.status in ("failed", "error")]

    @property
    def verdict(self) -> Literal["passed", "failed", "inconclusive"]:
        """Of all checks together; inconclusive where none of them came to one."""
        if self.failed:
            return "failed"
        return "passed" if any(r.status in ("passed", "expected_failure") for r in self.results) else "inconclusive"

    @property
    def only_raises(self) -> bool:
        """Whether there is nothing but errors that the subject raised."""
        failures = [result.failure for result in self.failed]
        return self.raises_everywhere or all(failure is not None and failure.traceback for failure in failures)

    @property
    def raises_everywhere(self) -> bool:
        """Whether one and the same error is most of what there is to report."""
        raised = [(result.failure, others) for result, others in self.failed_apart]
        most = max((1 + len(others) for failure, others in raised if failure and failure.traceback), default=0)
        return 2 * most > sum(result.status != "skipped" for result in self.results)

    @property
    def failed_apart(self) -> list[tuple[Result, list[str]]]:
        """The failures, each with the ids of later checks in which the subject raised the same error at the same line.

        By which of its own calls it came to that line, forward or generate, and what sizes of tensors do not fit, makes
        no other error. One of the backward pass is no line's, and is told in the message.
        """
        apart: list[tuple[Result, list[str]]] = []
        raised: dict[tuple[str, str], list[str]] = {}
        for result in self.failed:
            failure = result.failure
            error = None
            if failure is not None and (failure.traceback or _ERROR.match(failure.expected_and_seen[1])):
                error = (_NUMBER.sub("", failure.message), failure.raised_at)
            if error in raised:
                raised[error].append(result.check.id)
                continue
            apart.append((result, []))
            if error is not None:
                raised[error] = apart[-1][1]
        return apart

    @property
    def likely(self) -> tuple[Diagnosis, ...]:
        """What is worth showing of the diagnosis: the likeliest, and what comes near it."""
        return tuple(found for place, found in enumerate(self.diagnosis) if not place or found.score >= _LEAST_SCORE)

    @property
    def left_over(self) -> dict[str, str]:
        """Of each check that is unexplained, the likeliest of the causes that it names itself; none: ''."""
        causes = {result.check.id: result.failure.likely_causes for result in self.failed if result.failure is not None}
        return {id: next(iter(causes.get(id, ())), "") for id in self.unexplained}

    @property
    def doubtful(self) -> bool:
        """Whether even the likeliest is less likely than not."""
        return bool(self.likely) and self.likely[0].score < _FITS_WELL

    @property
    def led(self) -> list[tuple[Lead, Diagnosis]]:
        """:attr:`likely`, with how each follows on the ones before: as a further bug, or instead of one of several."""
        at_once = 1 + sum(found.beside for found in self.likely)

        def lead(place: int, found: Diagnosis) -> Lead:
            if found.beside:
                return "beside"
            return "instead" if place == at_once > 1 else ""

        return [(lead(place, found), found) for place, found in enumerate(self.likely)]

    def to_dict(self) -> dict[str, Any]:
        """The document of ``--json``."""
        return {
            "schema": 1,
            "subject": self.subject,
            "verdict": self.verdict,
            "seed": self.seed,
            "profile": self.profile,
            "torch": self.torch,
            "device": self.device,
            "dtype": self.dtype,
            "called": self.called,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "configurations_refused": len(self.refused),
            "left_out": list(self.left_out),
            "checks": [_result_dict(result) for result in self.results],
            "symptoms": dict(self.symptoms),
            "diagnosis": [_diagnosis_dict(found) for found in self.diagnosis],
            "unexplained": list(self.unexplained),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_text(self, color: bool = False, lang: Lang = "en") -> str:
        """The report for a person: one line a check, then each failure."""
        from diymodel.verify.text import to_text

        return to_text(self, color, lang)


def _diagnosis_dict(found: Diagnosis) -> dict[str, Any]:
    from diymodel.verify.explain import explain_diagnosis

    return {
        "bug": found.bug,
        "score": round(found.score, 4),
        "explanation": explain_diagnosis(found),
        "evidence": list(found.evidence),
        "beside": found.beside,
    }


def _finite(number: float | None) -> float | None:
    """JSON knows no infinity, as which a difference from a NaN counts."""
    return number if number is not None and math.isfinite(number) else None


def _result_dict(result: Result) -> dict[str, Any]:
    failure = result.failure
    return {
        "id": result.check.id,
        "step": result.check.step,
        "status": result.status,
        "examples": result.examples,
        "seconds": round(result.seconds, 3),
        "reason": result.reason,
        "failure": None
        if failure is None
        else {
            "message": failure.message,
            "likely_causes": list(failure.likely_causes),
            "config": failure.config,
            "values": failure.values,
            "max_abs_diff": _finite(failure.max_abs_diff),
            "tolerance": _finite(failure.tolerance),
            "reproduce": failure.reproduce,
            "traceback": failure.traceback,
        },
    }
