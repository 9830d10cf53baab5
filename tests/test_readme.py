"""What the two READMEs say of the code is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.held_out import names, ranks
from benchmarks.two_bugs import pairs, tell_apart
from diymodel.verify.catalogue import bug_class
from diymodel.verify.diagnose import leave_one_base_out
from diymodel.verify.samples import read_samples
from diymodel.verify.tolerance import FALSE_ALARMS, HEALTHY_TRIALS
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs
from diymodel.zoo.matrix import figures
from diymodel.zoo.page import picture

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"

ROADMAP_ROW = re.compile(r"^\| (\d\.\d) \| .* \| \[[\w.]+\]\(([\w/.]+)\) \| `(.*)` \|$", re.MULTILINE)
CODE_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
STEPS = ["1.1", "1.2", "1.3", "2.1", "2.2", "2.3", "3.1", "3.2", "3.3", "4.1", "4.2", "4.3", "5.1", "5.2", "5.3", "5.4"]


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_each_step_of_the_roadmap_names_a_line_that_exists(readme: Path) -> None:
    rows = ROADMAP_ROW.findall(readme.read_text(encoding="utf-8"))
    assert [step for step, _, _ in rows] == STEPS
    for step, file, line in rows:
        lines = [found.strip() for found in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        assert line in lines, f"step {step}: {file} has no line {line!r}"


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_tree_lists_every_module(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for path in (ROOT / "diymodel").glob("*.py"):
        assert path.name.startswith("__") or f"\n  {path.name} " in text, f"{readme.name} does not list {path.name}"
    for path in (ROOT / "diymodel" / "verify").glob("*.py"):
        assert path.name.startswith("__") or path.name in text, f"{readme.name} does not list verify/{path.name}"


def test_both_languages_show_the_same_code() -> None:
    def code(readme: Path) -> list[str]:
        blocks = CODE_BLOCK.findall(readme.read_text(encoding="utf-8"))
        return [re.sub(r"\s+#.*", "", block) for language, block in blocks if language in ("bash", "python")]

    assert code(ENGLISH) == code(CHINESE)


def test_the_python_example_runs() -> None:
    (example,) = (block for language, block in CODE_BLOCK.findall(ENGLISH.read_text("utf-8")) if language == "python")
    names: dict[str, object] = {}
    exec(example, names)
    assert names["tokens"].shape == (2, 36)  # type: ignore[attr-defined]


def test_the_false_alarms_that_reports_state_are_those_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/false_alarms.json").read_text("utf-8"))["totals"]["all"]
    assert measured["trials"] >= HEALTHY_TRIALS
    assert measured["alarms"] == FALSE_ALARMS


def test_the_figures_of_zoo_and_diagnosis_are_those_measured() -> None:
    samples = read_samples()
    found, named = figures(samples), leave_one_base_out(samples)
    assert named.first / named.bugs >= 0.95, named.wrong
    assert named.among_three / named.bugs >= 0.98, named.wrong
    first, three = f"{named.first / named.bugs:.1%}", f"{named.among_three / named.bugs:.1%}"
    english, chinese = (readme.read_text("utf-8") for readme in (ENGLISH, CHINESE))
    assert f"{found.bugs} planted bugs of {found.classes} classes in {len(BASES)} models" in english
    assert f"first in {first}, and among the first three in {three}" in english
    assert f"{found.classes} 类共 {found.bugs} 个 bug" in chinese
    for text in (english, chinese):
        assert {first, three} <= set(re.findall(r"\d+\.\d%", text))


def test_the_figures_of_bugs_that_the_diagnosis_was_not_made_on_are_those_measured() -> None:
    samples = read_samples((ROOT / "benchmarks/results/held-out.json").read_text("utf-8"))
    assert [sample.bug for sample in samples] == names()
    named = ranks(samples)
    first = sum(named[sample.bug][:1] == [sample.slug] for sample in samples)
    three = sum(sample.slug in named[sample.bug] for sample in samples)
    english, chinese = (readme.read_text("utf-8") for readme in (ENGLISH, CHINESE))
    assert f"of {len(samples)} changes to our own model" in english
    assert f"{first} come first and {three} among three" in english
    assert f"做的 {len(samples)} 处改动" in chinese
    assert f"{first} 处排第一，{three} 处在前三" in chinese


def test_the_figures_of_public_fixes_are_those_measured() -> None:
    cases = json.loads((ROOT / "benchmarks/results/public-fixes.json").read_text("utf-8"))["cases"]
    noticed = [case for case in cases if case["noticed"]]
    named = [case for case in noticed if case["class"]]
    first = sum(case["named"][:1] == [case["class"]] for case in named)
    three = sum(case["class"] in case["named"] for case in named)
    repositories, visible = len({case["repository"] for case in cases}), sum(case["visible"] for case in cases)
    assert len({case["fix"] for case in cases}) == len(cases)
    assert all(bug_class(case["class"]) for case in named)
    files = ("benchmarks/public-fixes.md", "README.md", "README.zh-CN.md")
    page, english, chinese = (re.sub(r"\s+", " ", (ROOT / name).read_text("utf-8")) for name in files)
    assert f"{len(cases)} commits of {repositories} public repositories" in page
    assert f"**The harness notices {len(noticed)}**" in page
    assert (
        f"Of {len(named)} of these whose class is in the catalogue, {first} are named first and {three} among" in page
    )
    assert all(f"| {case['repository']} | {case['fix'][:7]} |" in page for case in cases)
    assert f"**Of {len(cases)} bugs that were really made, and really fixed, in {repositories} public" in english
    assert f"it notices {len(noticed)}; {visible} are of a kind that a module shows" in english
    assert (
        f"**{repositories} 个公开仓库里真实出现、真实修复过的 {len(cases)} 个 bug**，发现了 {len(noticed)} 个"
        in chinese
    )
    assert f"{visible} 个是从模块本身能看出来的" in chinese


def test_the_figures_of_two_bugs_at_once_are_those_measured() -> None:
    samples = read_samples((ROOT / "benchmarks/results/two-bugs.json").read_text("utf-8"))
    assert [sample.bug for sample in samples] == [f"{one.id} + {other.id}" for one, other in pairs()]
    found = tell_apart(samples)
    english, chinese = (re.sub(r"\s+", " ", readme.read_text("utf-8")) for readme in (ENGLISH, CHINESE))
    assert f"of {found.pairs} pairs of bugs" in english
    assert f"the first two in {found.both_first} and among three in {found.among_three}" in english
    assert f"{found.pairs} 对里有 {found.both_first} 对两个都排在前两位，{found.among_three} 对都在前三" in chinese


def test_the_figures_of_luck_and_of_the_picture_are_those_measured() -> None:
    luck = json.loads((ROOT / "benchmarks/results/zoo-luck.json").read_text("utf-8"))
    bugs = {bug.id for bug in list_bugs()}
    assert all(set(table["escaped"]) == bugs for table in luck.values())
    assert not any(luck["standard"]["escaped"].values())
    escaped = [len(seeds) for seeds in luck["quick"]["escaped"].values() if seeds]
    seeds, found = luck["quick"]["seeds"], figures(read_samples())
    runs, single = seeds * len(bugs), len(found.single_killer)
    english, chinese = (re.sub(r"\s+", " ", readme.read_text("utf-8")) for readme in (ENGLISH, CHINESE))
    assert f"can miss {len(escaped)} of them: {sum(escaped)} of {runs:,} runs over {seeds} seeds did" in english
    assert f"the likeliest one in {max(escaped)} of {seeds}. " in english
    assert f"which kills {found.killed}; {single} of them have a single killer" in english
    assert f"其中 {len(escaped)} 个：{seeds} 个种子共 {runs:,} 次运行漏掉 {sum(escaped)} 次" in chinese
    assert f"抓住 {found.killed} 个；其中 {single} 个只有一项检查能抓住" in chinese


def test_the_picture_of_the_matrix_is_that_of_the_samples() -> None:
    assert (ROOT / "benchmarks/results/zoo.svg").read_text("utf-8") == picture(read_samples())
