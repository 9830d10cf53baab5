"""The report as one self-contained page: no network, no scripts, light and dark, readable on a phone.

Messages of failures and reasons come from the checks and stay English; everything else speaks the page's language.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from diymodel.verify.catalogue import bug_class
from diymodel.verify.explain import cause, explain, explain_diagnosis, title
from diymodel.verify.registry import Check
from diymodel.verify.report import Failure, Lang, Report, Result
from diymodel.verify.text import notes
from diymodel.verify.words import MARKS, STATUS, STEPS, WORDS, equal_means

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2127; --soft: #5b6570; --line: #dde1e6;
  --code: #eef0f3; --good: #17693a; --bad: #b3261e; --unsure: #835400; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --text: #e5e8eb; --soft: #a0a9b2;
  --line: #363c42; --code: #2a2f35; --good: #6fce92; --bad: #ff8a80; --unsure: #e9b44c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55; overflow-wrap: anywhere;
  font-family: system-ui, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 .75rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0; }
h4 { font-size: .875rem; color: var(--soft); margin: 1.1rem 0 .3rem; }
p, ul { margin: .4rem 0; }
ul { padding-left: 1.2rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85em; }
code { background: var(--code); border-radius: .25rem; padding: .1em .3em; }
pre { background: var(--code); border-radius: .4rem; padding: .7rem .8rem; margin: .4rem 0; overflow-x: auto;
  overflow-wrap: normal; line-height: 1.45; }
pre code { background: none; padding: 0; font-size: 1em; }
pre.replay { white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; border: 1px solid var(--line); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin: .75rem 0; }
.verdict { font-size: 1.1rem; font-weight: 700; }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .6rem 0 0; font-size: .9rem; }
.facts div { display: flex; gap: .4rem; }
.facts dt, .soft { color: var(--soft); }
.facts dd { margin: 0; }
.soft { font-size: .85rem; }
.checks { list-style: none; margin: .6rem 0 0; padding: 0; }
.checks li { display: grid; grid-template-columns: 6.5rem 1fr; gap: .1rem .6rem; padding: .45rem 0;
  border-top: 1px solid var(--line); }
.checks p { margin: .1rem 0 0; }
.status { font-weight: 600; white-space: nowrap; font-size: .9rem; }
.status.wide { white-space: normal; }
.status b { display: inline-block; width: 1.2em; }
.passed { color: var(--good); } .failed, .error { color: var(--bad); }
.inconclusive, .expected_failure { color: var(--unsure); } .skipped { color: var(--soft); }
.failure { border-left: .3rem solid var(--bad); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; border-top: 1px solid var(--line); padding: .25rem .5rem .25rem 0; }
th { font-weight: 400; color: var(--soft); white-space: nowrap; width: 1%; padding-right: 1.2rem; }
details { margin-top: 1.1rem; border-top: 1px solid var(--line); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; }
a { color: inherit; }
@media (max-width: 34rem) { .checks li { grid-template-columns: 5.2rem 1fr; } .card { padding: .8rem; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""


def to_html(report: Report, lang: Lang = "en") -> str:
    """The page, complete from the doctype on."""
    words = WORDS[lang]
    parts = [
        "<!doctype html>",
        f'<html lang="{"zh-CN" if lang == "zh" else "en"}">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{words['title']} {escape(report.subject)}</title>",
        f"<style>{_STYLE}</style></head>",
        "<body><main>",
        _header(report, lang),
        *([_diagnosis(report, lang)] if report.failed else []),
        f"<h2>{words['checks']}</h2>",
        *(_step(step, list(results), lang) for step, results in itertools.groupby(report.results, _step_of)),
    ]
    if report.failed:
        parts.append(f"<h2>{words['failures']}</h2>")
        parts += [_failure(result, lang, others) for result, others in report.failed_apart]
    return "\n".join([*parts, "</main></body>", "</html>"]) + "\n"


def _header(report: Report, lang: Lang) -> str:
    words, names = WORDS[lang], STATUS[lang]
    counts = {status: sum(result.status == status for result in report.results) for status in MARKS}
    said = " · ".join(f"{count} {names[status]}" for status, count in counts.items() if count)
    facts = {
        "torch": report.torch,
        words["device"]: report.device,
        words["dtype"]: report.dtype,
        words["profile"]: report.profile,
        words["seed"]: str(report.seed),
        words["time"]: f"{report.seconds:.1f} {words['seconds']}",
    }
    return "\n".join(
        [
            f"<h1>{words['title']} <code>{escape(report.subject)}</code></h1>",
            '<div class="card">',
            f'<div class="verdict {report.verdict}">{MARKS[report.verdict]} {names[report.verdict]}</div>',
            f"<p>{said}</p>",
            *(f'<p class="soft">{escape(note)}</p>' for note in notes(report, lang)),
            *(f"<p>{_jump(result)}</p>" for result in report.failed),
            f'<p class="soft">{words["called"]} <code>{escape(report.called)}</code></p>',
            f'<p class="soft">{equal_means(lang)}</p>',
            '<dl class="facts">',
            *(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items()),
            "</dl></div>",
        ]
    )


def _diagnosis(report: Report, lang: Lang) -> str:
    words = WORDS[lang]
    lines = [f"<h2>{words['diagnosis']}</h2>"]
    if not report.likely:
        lines.append(f'<p class="card">{words["raises" if report.only_raises else "unknown"]}</p>')
    if report.doubtful:
        lines.append(f"<p>{words['doubtful']}</p>")
    for lead, found in report.led:
        if lead:
            lines.append(f"<p>{words[lead]}:</p>")
        look = bug_class(found.bug).text(lang).look_for
        lines += [
            '<section class="card failure">',
            f"<h3><code>{escape(found.bug)}</code> · {found.score:.0%}</h3>",
            f"<p>{_inline(explain_diagnosis(found, lang))}</p>",
            f"<h4>{words['look']}</h4><p>{_inline(look)}</p>",
            f'<p class="soft"><code>diymodel zoo show {escape(found.bug)}</code></p></section>',
        ]
    if report.likely and report.unexplained:
        names = ", ".join(
            f"<code>{escape(id)}</code>{f' ({escape(cause)}?)' if cause else ''}"
            for id, cause in report.left_over.items()
        )
        lines.append(f"<p>{words['unexplained']}: {names}</p>")
    return "\n".join(lines)


def _step_of(result: Result) -> str:
    return result.check.step


def _step(step: str, results: Iterable[Result], lang: Lang) -> str:
    english, chinese = STEPS.get(step, ("", ""))
    heading = f"{WORDS[lang]['step']} {escape(step)} {chinese if lang == 'zh' else english}"
    lines = ['<section class="card">', f"<h3>{heading}</h3>", '<ul class="checks">']
    for result in results:
        where = _jump(result) if result.status in ("failed", "error") else f"<code>{escape(result.check.id)}</code>"
        reason = f'<p class="soft">{escape(result.reason)}</p>' if result.reason else ""
        name = escape(title(result.check, lang))
        lines.append(f'<li>{_status(result, lang)}<div>{name}<p class="soft">{where}</p>{reason}</div></li>')
    return "\n".join([*lines, "</ul></section>"])


def _status(result: Result, lang: Lang) -> str:
    name = STATUS[lang][result.status]
    wide = " wide" if " " in name else ""
    return f'<span class="status {result.status}{wide}"><b aria-hidden="true">{MARKS[result.status]}</b>{name}</span>'


def _jump(result: Result) -> str:
    name = escape(result.check.id)
    return f'<a href="#{name}"><code>{name}</code></a>'


def _failure(result: Result, lang: Lang, others: Sequence[str]) -> str:
    words, check, failure = WORDS[lang], result.check, result.failure
    lines = [
        f'<section class="card failure" id="{escape(check.id)}">',
        f"<h3>{_status(result, lang)} {escape(title(check, lang))}</h3>",
        f'<p class="soft"><code>{escape(check.id)}</code> · {words["step"]} {escape(check.step)}</p>',
    ]
    if result.reason:
        lines.append(f"<p>{escape(result.reason)}</p>")
    if others:
        names = ", ".join(f'<code id="{escape(id)}">{escape(id)}</code>' for id in others)
        lines.append(f"<p>{words['same']} {names}</p>")
    if failure is not None:
        lines += [*_message(failure, lang), *_evidence(failure, check, lang)]
    text = _without_title(explain(check.id, lang))
    lines.append(f"<details><summary>{words['explain']}</summary>\n{render_markdown(text)}\n</details>")
    return "\n".join([*lines, "</section>"])


def _message(failure: Failure, lang: Lang) -> list[str]:
    expected, seen = failure.expected_and_seen
    parts = {"raised" if failure.traceback else "expected": expected} | ({"seen": seen} if seen else {})
    return [f'<h4>{WORDS[lang][name]}</h4><p lang="en">{escape(text)}</p>' for name, text in parts.items()]


def _evidence(failure: Failure, check: Check, lang: Lang) -> list[str]:
    words = WORDS[lang]
    lines = []
    if failure.max_abs_diff is not None and failure.tolerance is not None:
        lines.append(
            f'<p class="soft">{words["difference"]} {failure.max_abs_diff:.3g} · {words["tolerance"]} '
            f"{failure.tolerance:.3g}</p>"
        )
    if failure.traceback:
        lines.append(f"<h4>{words['traceback']}</h4><pre><code>{escape(failure.traceback)}</code></pre>")
    if failure.likely_causes:
        first, *others = [_cause(slug, check, lang) for slug in failure.likely_causes]
        lines.append(f"<h4>{words['cause']}</h4><p>{first}</p>")
        if others:
            items = "".join(f"<li>{cause}</li>" for cause in others)
            lines.append(f"<details><summary>{words['others']} ({len(others)})</summary><ul>{items}</ul></details>")
    rest = {name: value for name, value in failure.values.items() if name != "config"}
    tables = [
        f"<div><h4>{words[name]}</h4>{_table(values)}</div>"
        for name, values in (("config", failure.config), ("input", rest))
        if values
    ]
    if tables:
        lines.append(f'<div class="pair">{"".join(tables)}</div>')
    replay = f'{words["replay"]} <span class="soft">({words["select"]})</span>'
    lines.append(f'<h4>{replay}</h4><pre class="replay"><code>{escape(failure.reproduce)}</code></pre>')
    return lines


def _table(values: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td><code>{escape(_json(value))}</code></td></tr>'
        for name, value in values.items()
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _without_title(text: str) -> str:
    return text.partition("\n")[2]


def _cause(slug: str, check: Check, lang: Lang) -> str:
    """A bug's slug, and what the check's text says about it."""
    said = cause(slug, check, lang).removeprefix(slug)
    return f"<code>{escape(slug)}</code>{_inline(said)}"


# --- Markdown, as far as the texts on the checks use it --------------------------------------------------------------


def render_markdown(text: str) -> str:
    """HTML of headings, paragraphs, bullet lists and fenced code, with bold and code in the line."""
    blocks = re.split(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    html: list[str] = []
    for index, block in enumerate(blocks):  # every second one is what stood in a fence
        if index % 2:
            html.append(f"<pre><code>{escape(block.rstrip())}</code></pre>")
        else:
            html += [_block(lines) for lines in re.split(r"\n\s*\n", block.strip()) if lines]
    return "\n".join(html)


def _block(text: str) -> str:
    if text.startswith("#"):
        return f"<h4>{_inline(text.lstrip('#').strip())}</h4>"
    if text.startswith("- "):
        items = "".join(f"<li>{_inline(item)}</li>" for item in re.split(r"^- ", text, flags=re.MULTILINE) if item)
        return f"<ul>{items}</ul>"
    return f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    """Code first, so that a star in it stays a star."""
    parts = re.split(r"`([^`]+)`", text.strip())
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"<code>{escape(part)}</code>"
        else:
            parts[index] = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(part), flags=re.DOTALL)
    return "".join(parts)
