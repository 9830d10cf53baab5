"""The page: complete, escaped, self-contained, well nested, in both languages."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import pytest

from diymodel.verify.explain import explain
from diymodel.verify.html import render_markdown, to_html
from diymodel.verify.registry import Check, list_checks
from diymodel.verify.report import Failure, Lang, Report, Result, Status

VOID = {"meta", "br", "hr", "img", "link", "input"}
LANGS: list[Lang] = ["en", "zh"]
each_lang = pytest.mark.parametrize("lang", LANGS)


class Page(HTMLParser):
    """Checks the nesting, and keeps tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        assert not ("p" in self.stack and tag in ("p", "ul", "li", "pre", "table", "div", "section", "details", "h4"))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def failure(check: Check, message: str = "expected 1, saw 2") -> Failure:
    config = {"num_layers": 1, "hidden_size": 2, "dropout": 0.0}
    values = {"config": config, "weights": 0, "tokens": [[0, 1]], "note": "<b>&"}
    return Failure(message, check.causes, config, values, f"diymodel verify m.py:LM --only {check.id}", 0.3, 1e-11)


def report(subject: str = "m.py:LM", status: Status = "failed") -> Report:
    """Every check once; the statuses take turns, but for ``status`` in the first."""
    turns: list[Status] = ["passed", "failed", "skipped", "inconclusive", "expected_failure", "error"]
    results = []
    for index, check in enumerate(list_checks()):
        now = turns[index % len(turns)] if index else status
        reason = None if now in ("passed", "failed") else f"reason <{index}>"
        results.append(Result(check, now, 10, 0.1, reason, failure(check) if now == "failed" else None))
    return Report(subject, 7, "quick", "2.13.0", "cpu", "float64", 12.34, results, ("c",), "interrupted in <x>")


@each_lang
def test_page_is_well_nested_and_shows_every_check(lang: Lang) -> None:
    page = Page(to_html(report(), lang))
    for result in report().results:
        assert result.check.id in page.text
        assert (
            result.check.title if lang == "en" else explain(result.check.id, "zh").partition("\n")[0][2:]
        ) in page.text
        assert (result.reason or "") in page.text
    for fact in ("m.py:LM", "2.13.0", "cpu", "float64", "quick", "7", "12.3", "interrupted in <x>"):
        assert fact in page.text
    words = ["passed", "failed", "error", "inconclusive", "expected failure", "skipped"]
    for word in words if lang == "en" else ["通过", "失败", "出错", "无法判定", "预期失败", "跳过"]:
        assert word in page.text  # the status is not told by colour or mark alone


@each_lang
def test_each_failure_is_told_in_full(lang: Lang) -> None:
    made = report()
    page = Page(to_html(made, lang))
    assert made.failed
    assert page.tags.count("summary") >= len(made.failed)
    for result in made.failed:
        assert ("id", result.check.id) in page.attributes
        assert (
            page.attributes.count(("href", f"#{result.check.id}")) == 2
        )  # from the top of the page, and from the list
        for cause in result.failure.likely_causes if result.failure else ():
            assert cause in page.text
        if result.failure:
            assert result.failure.reproduce in page.text
    for shown in ("expected 1", "2", "num_layers", "tokens", "[[0, 1]]", "0.3", "1e-11"):
        assert shown in page.text


@each_lang
def test_everything_is_escaped(lang: Lang) -> None:
    evil = "<script>alert('1')</script>\" onload=\"x"
    check = list_checks()[0]
    strange = Check(check.id, evil, "9.9", (), (evil,), check.function)
    broken = Failure(evil, (evil,), {evil: evil}, {evil: evil}, evil, traceback=evil)
    results = [Result(strange, "failed", reason=evil, failure=broken)]
    html = to_html(Report(evil, 0, evil, evil, evil, evil, results=results, interrupted=evil, called=evil), lang)
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name == "onload" for name, _ in page.attributes)
    assert page.text.count(evil) >= 8
    assert "<script" not in html


@each_lang
def test_nothing_is_loaded_from_anywhere(lang: Lang) -> None:
    html = to_html(report(), lang)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src"))


@each_lang
def test_suits_both_schemes_and_phones(lang: Lang) -> None:
    html = to_html(report(), lang)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport" content="width=device-width' in html
    assert f'<html lang="{"en" if lang == "en" else "zh-CN"}">' in html


def test_a_report_without_failures_has_no_section_for_them() -> None:
    check = list_checks()[0]
    html = to_html(Report("m", 0, "quick", "2", "cpu", "float64", results=[Result(check, "passed", 1)]))
    Page(html)
    assert "Failures" not in html
    assert "✓ passed" in html


def test_a_report_of_nothing_is_a_page() -> None:
    assert "m.py:LM" in Page(to_html(Report("m.py:LM", 0, "quick", "2", "cpu", "float64"))).text


@each_lang
@pytest.mark.parametrize("check", list_checks(), ids=lambda check: check.id)
def test_every_text_renders_whole(check: Check, lang: Lang) -> None:
    text = explain(check.id, lang)
    html = render_markdown(text)
    page = Page(html)
    assert (page.tags.count("h4"), page.tags.count("pre"), page.tags.count("ul")) == (6, 1, 1)
    outside_code = re.sub(r"<code>.*?</code>", "", html, flags=re.DOTALL)
    assert not re.search(r"[`*#]", unescape(outside_code))
    squeezed = re.sub(r"[\s`*#-]|```\w*", "", text.replace("```python", ""))
    assert re.sub(r"[\s`*#-]", "", page.text) == squeezed


def test_markdown_keeps_marks_inside_code() -> None:
    assert render_markdown("a **b** `c ** d <e>`") == "<p>a <strong>b</strong> <code>c ** d &lt;e&gt;</code></p>"
    assert render_markdown("- one\n- two `x`") == "<ul><li>one</li><li>two <code>x</code></li></ul>"
    assert (
        render_markdown("```python\n# no heading\n\nx < 1\n```\n") == "<pre><code># no heading\n\nx &lt; 1</code></pre>"
    )
