"""Every check has a text in English and Chinese, and the texts say what the registry says."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from diymodel.verify.explain import explain, explained
from diymodel.verify.registry import Check, list_checks
from diymodel.verify.report import Lang

CHECKS = list_checks()
SECTIONS: dict[Lang, list[str]] = {
    "en": ["What it means", "Why it matters", "Likely causes", "How to fix it", "Example"],
    "zh": ["含义", "为什么重要", "常见原因", "怎么修", "例子"],
}
LANGS: list[Lang] = ["en", "zh"]

each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
each_lang = pytest.mark.parametrize("lang", LANGS)


def sections(check: Check, lang: Lang) -> dict[str, str]:
    """The bodies by heading."""
    _, *parts = re.split(r"^## (.+)\n", explain(check.id, lang), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_check_has_a_text_and_each_text_a_check() -> None:
    assert explained() == sorted(check.id for check in CHECKS)


@each_check
@each_lang
def test_has_every_section_in_order(check: Check, lang: Lang) -> None:
    found = sections(check, lang)
    assert list(found) == SECTIONS[lang]
    assert all(body.strip() for body in found.values())


@each_check
def test_english_heading_is_the_title(check: Check) -> None:
    assert explain(check.id).startswith(f"# {check.title}\n")


@each_check
def test_chinese_half_is_chinese_and_the_english_is_not(check: Check) -> None:
    assert re.search(r"[\u4e00-\u9fff]", explain(check.id, "zh").partition("\n")[0])
    assert not re.search(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]", explain(check.id, "en"))


@each_check
@each_lang
def test_causes_are_the_registered_ones_in_order(check: Check, lang: Lang) -> None:
    body = sections(check, lang)[SECTIONS[lang][2]]
    assert tuple(re.findall(r"^- `([a-z0-9-]+)`", body, re.MULTILINE)) == check.causes
    assert all(re.fullmatch(r"- `[a-z0-9-]+`(: |：).+", line) for line in body.split("\n") if line)


@each_check
@each_lang
def test_every_code_block_compiles_and_shows_wrong_and_right(check: Check, lang: Lang) -> None:
    text = explain(check.id, lang)
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    assert text.count("```") == 2 * len(blocks)
    for block in blocks:
        compile(block, check.id, "exec")
        for word in ("wrong", "right") if lang == "en" else ("错", "对"):
            assert f"# {word}" in block


@pytest.mark.parametrize("unknown", ["decode.cached_equal_full", "decode.cached_equals_full.md"])
def test_unknown_check_names_the_nearest(unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"'{re.escape(unknown)}'; the nearest is 'decode\.cached_equals_full'"):
        explain(unknown)


@pytest.mark.parametrize("unknown", ["", "__init__", "../explain/shape.logits", "/etc/hostname"])
def test_only_ids_of_checks_are_read(unknown: str) -> None:
    with pytest.raises(ValueError, match="no check is called"):
        explain(unknown)


def test_marker_stands_once_in_each_file() -> None:
    for name in explained():
        text = resources.files("diymodel.verify.explain").joinpath(f"{name}.md").read_text(encoding="utf-8")
        assert text.count("<!-- zh -->") == 1, name
