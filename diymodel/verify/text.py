"""The report as text for a terminal: one line a check, then each failure."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diymodel.verify.catalogue import bug_class
from diymodel.verify.explain import cause, explain_diagnosis, title
from diymodel.verify.report import Lang, Report, Result, Status
from diymodel.verify.words import MARKS, STATUS, STEPS, WORDS, equal_means

_WIDTH = 116  # of a line of ids
_COLORS: dict[Status, str] = {
    "passed": "32",
    "failed": "31",
    "error": "31",
    "inconclusive": "33",
    "expected_failure": "33",
    "skipped": "90",
}


def to_text(report: Report, color: bool = False, lang: Lang = "en") -> str:
    """The whole report."""
    words = WORDS[lang]
    facts = (f"torch {report.torch}", report.device, report.dtype, report.profile, f"{words['seed']} {report.seed}")
    lines = [f"{words['title']} {report.subject}", "  " + " · ".join(facts), f"  {words['called']} {report.called}"]
    for step, found in itertools.groupby(report.results, key=lambda result: result.check.step):
        lines.append("\n" + _paint(f"  {words['step']} {step}  {STEPS[step][lang == 'zh']}", "1", color))
        for results in _alike(found):
            lines += [_line(results[0], color, lang)] if len(results) == 1 else _skipped(results, color)
    for result, others in report.failed_apart:
        lines += ["", *failure_lines(result, color, lang, others)]
    if report.failed:
        lines += ["", *diagnosis_lines(report, color, lang)]
    return "\n".join([*lines, "", _paint(equal_means(lang), "90", color), _summary(report, color, lang)]) + "\n"


def failure_lines(result: Result, color: bool = False, lang: Lang = "en", others: Sequence[str] = ()) -> list[str]:
    """What is known of one failed check, or of one that could not give a verdict.

    Args:
        others: the checks in which the subject raised the very same error.
    """
    words, check, failure = WORDS[lang], result.check, result.failure
    heading = _paint(f"{MARKS[result.status]} {check.id}: {title(check, lang)}", "1;31", color)
    if failure is None:
        return [heading, f"  {result.reason}"]
    expected, seen = failure.expected_and_seen
    said = {words["raised" if failure.traceback else "expected"]: expected}
    if seen:
        said[words["seen"]] = seen
    if others:
        said[words["same"]] = ", ".join(others)
    if failure.traceback:
        said[words["traceback"]] = failure.traceback.replace("\n", "\n    ").join(("\n    ", ""))
    if failure.likely_causes:
        first, *further = failure.likely_causes
        said[words["cause"]] = _paint(cause(first, check, lang), "1", color)
        if further:
            said[words["others"]] = ", ".join(further)
    said[words["config"]] = _values(failure.config)
    said[words["input"]] = _values({name: value for name, value in failure.values.items() if name != "config"})
    said[words["replay"]] = failure.reproduce
    said[words["more"]] = f"diymodel explain {check.id}" + (f" --lang {lang}" if lang != "en" else "")
    return [heading, *(f"  {_paint(name, '90', color)}: {text}" for name, text in said.items())]


def diagnosis_lines(report: Report, color: bool = False, lang: Lang = "en") -> list[str]:
    """The bugs that the whole pattern of verdicts and symptoms looks like."""
    words = WORDS[lang]
    lines = [_paint(words["diagnosis"], "1", color)]
    if not report.likely:
        return [*lines, f"  {words['raises' if report.only_raises else 'unknown']}"]
    if report.doubtful:
        lines.append(f"  {words['doubtful']}")
    for lead, found in report.led:
        if lead:
            lines.append(f"  {words[lead]}:")
        look = bug_class(found.bug).text(lang).look_for
        lines.append(f"  {found.score:4.0%}  {_paint(found.bug, '1', color)}: {explain_diagnosis(found, lang)}")
        lines.append(f"        {_paint(words['look'], '90', color)}: {look}")
        lines.append(f"        {_paint(words['more'], '90', color)}: diymodel zoo show {found.bug}")
    if report.unexplained:
        named = (f"{id} ({cause}?)" if cause else id for id, cause in report.left_over.items())
        lines.append(f"  {words['unexplained']}: {', '.join(named)}")
    return lines


def _alike(results: Iterable[Result]) -> list[list[Result]]:
    """Each by itself, but those that are skipped for the same reason together, in the place of the first."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(str(result.reason) if result.status == "skipped" else result.check.id, []).append(result)
    return list(groups.values())


def _skipped(results: Sequence[Result], color: bool) -> list[str]:
    """The ids of checks that are skipped for the same reason, and the reason."""
    ids = ", ".join(result.check.id for result in results)
    first, *more = textwrap.wrap(f"{ids}  ({results[0].reason})", _WIDTH, subsequent_indent="    ")
    mark = _paint(MARKS["skipped"], _COLORS["skipped"], color)
    return [f"  {mark} {_paint(first, '90', color)}", *(_paint(line, "90", color) for line in more)]


def _line(result: Result, color: bool, lang: Lang) -> str:
    mark = _paint(MARKS[result.status], _COLORS[result.status], color)
    reason = f"  ({result.reason})" if result.reason and result.status != "error" else ""  # that one stands below
    return f"  {mark} {result.check.id:<36} {title(result.check, lang)}{_paint(reason, '90', color)}"


def _summary(report: Report, color: bool, lang: Lang) -> str:
    words, names = WORDS[lang], STATUS[lang]
    counts = {status: sum(result.status == status for result in report.results) for status in MARKS}
    said = ", ".join(f"{count} {names[status]}" for status, count in counts.items() if count)
    verdict = _paint(names[report.verdict], f"1;{_COLORS[report.verdict]}", color)
    return "; ".join(
        [f"{verdict}{': ' if said else ''}{said}", f"{report.seconds:.1f} {words['seconds']}", *notes(report, lang)]
    )


def notes(report: Report, lang: Lang) -> list[str]:
    """What goes with the verdict: what was not tried, and why."""
    words = WORDS[lang]
    said = [f"{len(report.refused)} {words['refused']}"] if report.refused else []
    said += [f"{words['left_out']}: {', '.join(report.left_out)}"] if report.left_out else []
    return said + ([report.interrupted] if report.interrupted else [])


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _paint(text: str, code: str, color: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if color and text else text
