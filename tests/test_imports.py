"""Every module is imported with the minimum dependencies, and the versions named in one place are those of another."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import diymodel
from diymodel._compat import parse_version

ROOT = Path(__file__).parent.parent
PACKAGE = Path(diymodel.__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL = ["litgpt", "matplotlib", "numpy", "safetensors", "tokenizers", "transformers", "x_transformers"]
# Those that a person asks for by name where the package is installed; they are the peers that a benchmark runs.
PEERS = "diymodel.bench.peers."

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__"
)


def test_every_module_is_imported_with_the_minimum_dependencies() -> None:
    """In one process of its own, where every optional package is missing and a warning is an error."""
    code = f"""
import importlib, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
for name in {OPTIONAL}:
    sys.modules[name] = None
for name in {[name for name in MODULES if not name.startswith(PEERS)]}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def rows() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Python and torch of every row of tox.ini that names both."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    found = []
    for python, factors in re.findall(r"py(\d+)-torch\{([\d,]+)\}", tox["tox"]["env_list"]):
        found += [((3, int(python[1:])), (2, int(factor[1:]))) for factor in factors.split(",")]
    return found


def floor(package: str) -> tuple[int, int]:
    (found,) = (need for need in PYPROJECT["project"]["dependencies"] if need.startswith(f"{package}>="))
    return parse_version(found)


def test_the_oldest_row_is_the_oldest_version_that_is_promised() -> None:
    assert min(torch for _, torch in rows()) == floor("torch")
    assert min(python for python, _ in rows()) == parse_version(PYPROJECT["project"]["requires-python"])


def test_every_row_is_in_the_label_of_all_and_installs_its_torch() -> None:
    text = (ROOT / "tox.ini").read_text(encoding="utf-8")
    (label,) = re.findall(r"^    all = (.*)$", text, re.MULTILINE)
    named = {f"py{python[0]}{python[1]}-torch{torch[0]}{torch[1]}" for python, torch in rows()}
    assert set(label.split(", ")) == named | {"py311-lowest"}
    for _, (major, minor) in rows():
        assert f"torch{major}{minor}: torch=={major}.{minor}.*\n" in text


def test_the_workflow_runs_every_row() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    label = {f"py{python[0]}{python[1]}-torch{torch[0]}{torch[1]}" for python, torch in rows()}
    assert set(re.findall(r"row: ([\w-]+)}", workflow)) == label | {"py311-lowest"}


def test_the_version_stands_in_one_place() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert metadata.version("diymodel") == diymodel.__version__


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.13.0+cpu", (2, 13)), ("2.6.0a0+git1", (2, 6)), ("torch>=2.2", (2, 2)), (">=3.11", (3, 11))],
)
def test_versions_are_read(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version
