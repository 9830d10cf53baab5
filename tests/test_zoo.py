"""The zoo as its users meet it: lessons, quizzes, and the kill matrix as text, picture and page."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from diymodel.cli import main
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.registry import list_checks
from diymodel.verify.samples import Sample, read_samples, write_samples
from diymodel.verify.subject import resolve
from diymodel.zoo import matrix
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs
from diymodel.zoo.lesson import bugs_of, diff, lesson, train
from diymodel.zoo.page import page, picture, text
from diymodel.zoo.quiz import bug_of, quiz_file

FOUR = ("position-restarts-in-decode", "chunk-unmasked", "tie-lost", "loss-wrong-denominator")
SAMPLES = [
    Sample("a-hub", "chunk-unmasked", "hub", {"x.one": "failed", "x.two": "failed", "y.one": "passed"}, {}),
    Sample("a-rotary", "chunk-unmasked", "rotary", {"x.one": "passed", "x.two": "failed", "y.one": "passed"}, {}),
    Sample("b-hub", "tie-lost", "hub", {"x.one": "skipped", "x.two": "passed", "y.one": "inconclusive"}, {}),
]


# --- lessons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("slug", [found.slug for found in list_bug_classes()])
def test_every_class_is_a_lesson(slug: str, lang: str) -> None:
    said = lesson(slug, lang=lang, steps=0)  # type: ignore[arg-type]
    assert said.startswith(f"{slug}\n")
    if bugs := bugs_of(slug):
        assert ("\n+" in said) == (bugs[0].old != bugs[0].new)


def test_a_diff_is_the_bug_alone() -> None:
    for bug in (bug for bug in list_bugs() if bug.old != bug.new):
        changed = [line for line in diff(bug).splitlines()[2:] if line[0] in "+-"]
        assert 0 < len(changed) <= bug.old.count("\n") + bug.new.count("\n") + 2, bug.id


def test_training_shows_that_the_loss_falls_and_the_model_is_wrong() -> None:
    bug = next(bug for bug in bugs_of("labels-shifted-twice"))
    broken, correct = train(bug.subject(), 60), train(BASES[bug.base].subject(), 60)
    assert correct.true_last < 1 < correct.true_first
    assert broken.last < 1 < broken.first
    assert broken.true_last > broken.true_first


def test_a_lesson_in_a_base_that_has_no_such_bug_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"chunk-unmasked is not planted in base 'plain': it is in .*rotary"):
        lesson("chunk-unmasked", "plain", steps=0)


def test_show_prints_the_lesson(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "chunk-unmasked", "--base", "rotary"]) == 0
    out = capsys.readouterr().out
    assert "+        y = F.scaled_dot_product_attention" in out
    assert "with the bug: loss it trains on" in out
    assert "https://github.com/" in out


def test_an_unknown_slug_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "show", "chunk-unmaskd"]) == 2
    assert "the nearest is 'chunk-unmasked'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["matrix", "--seed", "1", "--jobs", "2"], "--seed, --jobs without --measure FILE"),
        (
            ["matrix", "--measure", "nowhere/samples.json"],
            "nowhere/samples.json cannot be written: there is no directory",
        ),
        (["matrix", "--measure", "samples.json", "--jobs", "0"], "--jobs 0: at least 1"),
        (["matrix", "--measure", "samples.json", "--html", "samples.json"], "samples.json is named for two files"),
        (["luck", "--json", "luck.json", "--seeds", "0"], "--seeds 0: at least 1"),
        (["luck", "--json", "luck.json", "--jobs", "0"], "--jobs 0: at least 1"),
        (["luck", "--json", "nowhere/luck.json"], "nowhere/luck.json cannot be written: there is no directory"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused_before_it_is_begun(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["zoo", *options]) == 2
    assert message in capsys.readouterr().err


# --- quizzes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(6))
def test_a_quiz_is_a_subject_that_can_be_verified(tmp_path: Path, number: int) -> None:
    path = tmp_path / "quiz.py"
    path.write_text(quiz_file(number, "quiz.py"), encoding="utf-8")
    subject = resolve(f"{path}:subject")
    assert subject.convention.describe() == bug_of(number).subject().convention.describe()
    assert bug_of(number).slug not in path.read_text(encoding="utf-8")


def test_a_quiz_from_file_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    right = bug_of(7).slug
    wrong = next(slug for slug in FOUR if slug != right)
    assert main(["zoo", "quiz", "7", "--out", "quiz.py"]) == 0
    assert main(["zoo", "quiz", "7", "--answer", wrong]) == 1
    assert main(["zoo", "quiz", "7", "--answer", right]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("quiz.py: diymodel verify quiz.py:subject")
    assert said[1].startswith(f"no, it is not {wrong}")
    assert said[2].startswith(f"yes: {right}")
    assert main(["zoo", "quiz", "7", "--out", "quiz.py"]) == 2
    assert "quiz.py exists" in capsys.readouterr().err
    assert main(["zoo", "quiz", "7", "--out", "quiz.txt"]) == 2
    assert "--out quiz.txt: a name that ends in .py" in capsys.readouterr().err
    assert not Path("quiz.txt").exists()


def test_a_quiz_has_a_number() -> None:
    with pytest.raises(ValueError, match="from 0 on, not -1"):
        bug_of(-1)


# --- the matrix ------------------------------------------------------------------------------------------------------


def test_samples_survive_their_file() -> None:
    with_symptoms = [*SAMPLES[1:], Sample("c", "tie-lost", "hub", dict(SAMPLES[0].verdicts), {"leak.faint": True})]
    assert read_samples(write_samples(with_symptoms, {"profile": "quick"})) == with_symptoms


def test_figures_of_a_matrix() -> None:
    said = matrix.figures(SAMPLES)
    assert (said.bugs, said.classes, said.killed) == (3, 2, 2)
    assert said.not_killed == ("b-hub",)
    assert said.single_killer == {"a-rotary": "x.two"}
    assert said.idle == ("y.one",)


def test_the_matrix_as_text_picture_and_page() -> None:
    said = text(SAMPLES)
    assert "chunk-unmasked                       2/2  x.two 2, x.one 1\n" in said
    assert "2 of 3 bugs of 2 classes are killed." in said
    svg = ElementTree.fromstring(picture(SAMPLES))
    titles = [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["chunk-unmasked · x.one: 1 of 2", "chunk-unmasked · x.two: 2 of 2"]
    assert page(SAMPLES).count("<svg") == 1


def test_measuring_goes_on_where_its_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bugs = tmp_path / "zoo.json", [bugs_of(slug)[0] for slug in FOUR[1:3]]
    checks = [check for check in list_checks() if check.id.startswith(("shape.", "decode.chunks"))]
    monkeypatch.setattr(matrix, "list_bugs", lambda: bugs)
    monkeypatch.setattr(matrix, "list_checks", lambda: checks)
    monkeypatch.setattr(matrix, "_parallel", lambda function, work, jobs: map(function, work))
    assert [sample.slug for sample in matrix.extend(path, "quick", 0)] == ["chunk-unmasked", "tie-lost"]
    seen: list[Sample] = []
    assert len(matrix.extend(path, "quick", 0, on_sample=seen.append)) == 2
    assert seen == []
    monkeypatch.setattr(matrix, "list_bugs", lambda: [*bugs[:1], bugs_of(FOUR[0])[0]])
    assert len(matrix.extend(path, "quick", 0, on_sample=seen.append)) == 2
    assert [sample.slug for sample in seen] == [FOUR[0]]
    assert json.loads(path.read_text(encoding="utf-8"))["profile"] == "quick"
    with pytest.raises(ValueError, match="measured with another seed"):
        matrix.extend(path, "quick", 1)


def test_luck_counts_the_seeds_that_let_a_bug_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bugs_of("chunk-unmasked")[0]
    monkeypatch.setattr(matrix, "list_bugs", lambda: [found])
    monkeypatch.setattr(matrix, "_parallel", lambda function, work, jobs: map(function, work))
    path = str(tmp_path / "luck.json")
    assert main(["zoo", "luck", "--json", path, "--seeds", "2"]) == 0
    assert "2 of 2 runs of 1 bugs at the quick profile killed the bug" in capsys.readouterr().out
    assert matrix.luck(Path(path), "quick", 2) == {found.id: []}
    with pytest.raises(ValueError, match="holds 2 seeds at quick, not 3"):
        matrix.luck(Path(path), "quick", 3)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    content["quick"]["escaped"] = {found.id: [1]}
    Path(path).write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(matrix, "_escapes", lambda arguments: (arguments[0], arguments[2]))
    assert matrix.luck(Path(path), "standard", 2) == {found.id: [1]}, "what the quick profile kills is tried again"
