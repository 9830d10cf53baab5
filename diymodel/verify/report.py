"""The outcome of a verification: what is kept of every check, the text for a person, the document for a program."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from diymodel.verify.registry import Check

Status = Literal["passed", "failed", "skipped", "inconclusive", "expected_failure", "error"]

_MARKS: dict[Status, tuple[str, str]] = {
    "passed": ("✓", "32"),
    "failed": ("✗", "31"),
    "error": ("!", "31"),
    "inconclusive": ("?", "33"),
    "expected_failure": ("x", "33"),
    "skipped": ("-", "90"),
}


@dataclass(frozen=True)
class Failure:
    """A refutation, shrunk: what was wrong, on which smallest example, and how to see it again."""

    message: str
    likely_causes: tuple[str, ...]
    config: dict[str, Any]
    values: dict[str, Any]  # everything drawn, by name
    reproduce: str
    max_abs_diff: float | None = None
    tolerance: float | None = None
    traceback: str | None = None  # the subject's own frames, where it raised


@dataclass(frozen=True)
class Result:
    """The verdict of one check."""

    check: Check
    status: Status
    examples: int = 0
    seconds: float = 0.0
    reason: str | None = None  # why it was skipped, inconclusive, expected to fail, or could not run
    failure: Failure | None = None


@dataclass
class Report:
    """All verdicts of one run, in the order of the roadmap."""

    subject: str
    seed: int
    profile: str
    torch: str
    device: str
    dtype: str
    seconds: float = 0.0
    results: list[Result] = field(default_factory=list)
    refused: tuple[str, ...] = ()  # configurations that the subject could not build
    interrupted: str | None = None  # why some checks were not run

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.status in ("failed", "error")]

    @property
    def verdict(self) -> Literal["passed", "failed"]:
        return "failed" if self.failed else "passed"

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
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "configurations_refused": len(self.refused),
            "checks": [_result_dict(result) for result in self.results],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_text(self, color: bool = False) -> str:
        """The report for a person: one line a check, then each failure."""
        lines = [
            f"{self.subject} · torch {self.torch} · {self.device} · {self.dtype} · profile {self.profile} · "
            f"seed {self.seed}"
        ]
        step = ""
        for result in self.results:
            if result.check.step != step:
                step = result.check.step
                lines.append(f"\n  step {step}")
            lines.append(_line(result, color))
        for result in self.failed:
            lines += ["", *failure_lines(result, color)]
        lines += ["", _summary(self)]
        return "\n".join(lines) + "\n"


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
            "max_abs_diff": failure.max_abs_diff,
            "tolerance": failure.tolerance,
            "reproduce": failure.reproduce,
            "traceback": failure.traceback,
        },
    }


def _paint(text: str, code: str, color: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if color else text


def _line(result: Result, color: bool) -> str:
    mark, code = _MARKS[result.status]
    reason = f"  ({result.reason})" if result.reason else ""
    return f"  {_paint(mark, code, color)} {result.check.id:<42} {result.check.title}{reason}"


def failure_lines(result: Result, color: bool) -> list[str]:
    failure = result.failure
    assert failure is not None
    lines = [_paint(f"✗ {result.check.id}: {result.check.title}", "1;31", color), f"  {failure.message}"]
    if failure.traceback:
        lines += ["  in the subject's own code:", *(f"    {line}" for line in failure.traceback.splitlines())]
    if failure.likely_causes:
        lines.append(f"  most likely cause: {failure.likely_causes[0]}")
        if len(failure.likely_causes) > 1:
            lines.append(f"  or: {', '.join(failure.likely_causes[1:])}")
    lines.append(f"  smallest configuration: {failure.config}")
    rest = {name: value for name, value in failure.values.items() if name != "config"}
    lines += [f"  smallest input: {rest}", f"  replay: {failure.reproduce}"]
    return lines


def _summary(report: Report) -> str:
    counts = {status: sum(result.status == status for result in report.results) for status in _MARKS}
    said = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items() if count)
    refused = f"; {len(report.refused)} configurations refused by the subject" if report.refused else ""
    interrupted = f"; {report.interrupted}" if report.interrupted else ""
    return f"{report.verdict}: {said} in {report.seconds:.1f} s{refused}{interrupted}"
