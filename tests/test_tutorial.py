"""What the tutorial has its reader write and run is written and run here, and prints what the tutorial shows."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diymodel.cli import main

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = ROOT / "TUTORIAL.md", ROOT / "TUTORIAL.zh-CN.md"

BLOCK = re.compile(r"```(\w+)\n(.*?)\n```", re.DOTALL)
MODEL = "my_lm.py"
WRITTEN = (MODEL, "exam.py")  # the files that grow
SHOWN_WITH = "2.13."  # the version of torch whose output the tutorial shows
LONGEST = 40  # lines of a block of code


def blocks(tutorial: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(tutorial.read_text(encoding="utf-8"))


def write(code: str, folder: Path) -> None:
    """A file as the reader writes it: whole, or for the model its new definitions in place of those of that name."""
    first, _, code = code.partition("\n")
    path = folder / first.removeprefix("# ")
    if path.name != MODEL or not path.exists():
        path.write_text(code + "\n", encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^(import|from) ", code, re.MULTILINE), f"only new definitions are taken over:\n{code}"
    for name, definition in definitions(code):
        old = dict(definitions(text)).get(name)
        text = f"{text}\n\n{definition}\n" if old is None else text.replace(old, definition)
    path.write_text(text, encoding="utf-8")


def definitions(code: str) -> Iterator[tuple[str, str]]:
    """The functions and classes of the top level, by name, with what decorates them."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        assert isinstance(node, ast.FunctionDef | ast.ClassDef), ast.unparse(node)
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        yield node.name, "\n".join(lines[start - 1 : node.end_lineno])


def change(diff: str, folder: Path) -> None:
    """Apply a diff to the one place in the reader's files that it fits."""
    lines = diff.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[:1] != other) for other in "+-")
    texts = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    (place,) = (path for path, text in texts.items() if path.name in WRITTEN and old in text)
    assert texts[place].count(old) == 1, f"the diff fits more than one place:\n{diff}"
    place.write_text(texts[place].replace(old, new), encoding="utf-8")


def run(command: str) -> None:
    forget_what_was_written()  # each command is a process of its own to the reader
    program, *arguments = shlex.split(command)
    if program == "python":
        runpy.run_path(arguments[0])
    else:
        assert program == "diymodel"
        assert main(arguments) in (0, 1)


def forget_what_was_written() -> None:
    for name in WRITTEN:
        sys.modules.pop(name.removesuffix(".py"), None)


def hold(shown: str, seen: str, command: str) -> None:
    """Every line that is shown was printed, in that order; ``…`` stands for what is left out."""
    printed = iter([line.strip() for line in seen.splitlines()])
    for line in map(str.strip, shown.splitlines()):
        pattern = ".*".join(map(re.escape, line.split("…")))
        if line not in ("", "…"):
            assert any(re.fullmatch(pattern, found) for found in printed), f"{command} does not print {line!r}:\n{seen}"


def verdict(text: str) -> str:
    return text.strip().splitlines()[-1].partition(":")[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's: the working directory, from which Python imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files here change within a second
    yield tmp_path
    forget_what_was_written()


@pytest.mark.slow
def test_the_reader_writes_runs_and_sees_what_the_tutorial_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = seen = ""
    for language, content in blocks(ENGLISH):
        if language == "python":
            write(content, folder)
        elif language == "diff":
            change(content, folder)
        elif language == "bash":
            command = content
            run(command)
            seen = capsys.readouterr().out
        elif torch.__version__.startswith(SHOWN_WITH) or command.startswith("python"):
            hold(content, seen, command)
        else:
            assert verdict(seen) == verdict(content), seen


def test_both_languages_have_the_same_blocks() -> None:
    assert blocks(ENGLISH) == blocks(CHINESE)


def test_no_block_of_code_is_long() -> None:
    for language, content in blocks(ENGLISH):
        assert language in ("python", "diff", "bash", "text")
        assert language == "text" or len(content.splitlines()) <= LONGEST
        assert language != "bash" or "\n" not in content


def test_each_step_is_examined() -> None:
    commands = [content for language, content in blocks(ENGLISH) if language == "bash"]
    steps = {step[0] for command in commands for step in re.findall(r"--step (\S+)", command)}
    assert steps == set("12345")
