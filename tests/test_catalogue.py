"""The catalogue of bug classes: complete, in two languages, with citations that can be followed."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import resources

import pytest

from diymodel.verify.catalogue import AREAS, BugClass, bug_class, list_bug_classes
from diymodel.verify.registry import list_checks
from diymodel.zoo.bug import list_bugs

CLASSES = list_bug_classes()
SLUGS = [found.slug for found in CLASSES]
TEXTS = ("what", "look_for", "symptom")
PLANTED = {bug.slug for bug in list_bugs()}

each_class = pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.slug)


@each_class
def test_slug_is_words_joined_by_hyphens(found: BugClass) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", found.slug)


def test_every_area_has_classes_and_they_stand_together() -> None:
    assert list(dict.fromkeys(found.area for found in CLASSES)) == list(AREAS)


def test_no_slug_stands_twice() -> None:
    files = (resources.files("diymodel.verify.catalogue").joinpath(f"{area}.toml") for area in AREAS)
    headings = [slug for file in files for slug in re.findall(r"^\[(.+)\]$", file.read_text("utf-8"), re.MULTILINE)]
    assert sorted(headings) == sorted(SLUGS)


@each_class
def test_english_is_sentences_without_chinese(found: BugClass) -> None:
    for name in TEXTS:
        text = getattr(found, name)
        assert re.fullmatch(r"[A-Z`].+\.", text), name
        assert not re.search(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]", text), name
        assert text.count("`") % 2 == 0, name


@each_class
def test_chinese_is_chinese_sentences(found: BugClass) -> None:
    for name in TEXTS:
        text = getattr(found, f"{name}_zh")
        assert text.endswith("。"), name
        prose = re.sub(r"`[^`]*`", "", text)
        assert len(re.findall(r"[\u4e00-\u9fff]", prose)) >= 8, name
        assert not re.search(r"[\u4e00-\u9fff][,;:!?.]", prose), f"{name}: half-width punctuation"
        assert text.count("`") % 2 == 0, name


@each_class
def test_texts_of_both_languages_name_the_same_code(found: BugClass) -> None:
    for name in TEXTS:
        english, chinese = (re.findall(r"`([^`]+)`", getattr(found, key)) for key in (name, f"{name}_zh"))
        assert set(english) == set(chinese), name


@each_class
def test_citations_can_be_followed(found: BugClass) -> None:
    assert len(found.seen) == len(set(found.seen))
    for citation in found.seen:
        assert re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+#[1-9][0-9]*", citation), citation


def test_every_cause_of_every_check_is_in_the_catalogue() -> None:
    missing = {cause: check.id for check in list_checks() for cause in check.causes if cause not in SLUGS}
    assert not missing, "give each a place in diymodel/verify/catalogue/<area>.toml"


def test_every_bug_of_the_zoo_is_in_the_catalogue() -> None:
    assert sorted(PLANTED - set(SLUGS)) == []


def test_every_class_is_planted_in_the_zoo_or_left_out_with_a_reason() -> None:
    assert [found.slug for found in CLASSES if not found.left_out and found.slug not in PLANTED] == []
    assert [found.slug for found in CLASSES if found.left_out and found.slug in PLANTED] == [], "no longer left out"


def test_a_class_is_found_by_its_slug() -> None:
    assert [bug_class(slug) for slug in SLUGS] == CLASSES


@pytest.mark.parametrize("unknown", ["position-restart-in-decode", "Position-Restarts-In-Decode"])
def test_unknown_slug_names_the_nearest(unknown: str) -> None:
    with pytest.raises(ValueError, match=rf"'{unknown}'; the nearest is 'position-restarts-in-decode'"):
        bug_class(unknown)


def test_slug_like_no_other_names_none() -> None:
    with pytest.raises(ValueError, match=r"no bug class is called '\?'$"):
        bug_class("?")


def test_reading_it_does_not_import_torch() -> None:
    program = "import sys, diymodel.verify.catalogue as it; it.list_bug_classes(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
