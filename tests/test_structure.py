"""The layout that design and README promise: who may import whom, and what an import costs."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diymodel

PACKAGE = Path(diymodel.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))

# From the ground up: a module may import those in earlier rows only.
LAYERS = [
    {"config", "_files", "_compat", "_machine"},
    {"_attributes", "_run", "counting", "devices", "tokenizer"},
    {"cost", "inputs", "weights", "loss", "cache", "linear", "data", "plot", "hf_form"},
    {"compiled"},
    {"generate"},
    {"model"},
    {"checkpoint", "int8"},
    {"overfit", "train"},
    {"verify"},
    {"zoo"},
    {"bench"},
    {"cli"},
]


def imported_modules(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, at the top or inside a function."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diymodel."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    level = next((i for i, layer in enumerate(LAYERS) if module in layer), None)
    assert level is not None, f"diymodel/{module}.py is new: give it a place in LAYERS"
    below = set().union(*LAYERS[:level])
    assert imported_modules(module) <= below, f"{module} imports {sorted(imported_modules(module) - below)} from above"


def test_the_harness_knows_the_model_in_one_place_only() -> None:
    """No check imports the model, and the model never imports the harness; verify/adapters.py is the bridge."""
    bridge = {"model", "loss", "cache", "checkpoint"}
    for path in (PACKAGE / "verify").rglob("*.py"):
        imports = re.findall(r"from diymodel\.(\w+)", path.read_text(encoding="utf-8"))
        allowed = {"config", "verify", "counting", "devices", "_files", "_compat"} | (
            bridge if path.name == "adapters.py" else set()
        )
        assert set(imports) <= allowed, f"{path.name} imports {set(imports) - allowed}"


def test_only_the_command_line_knows_the_benchmarks() -> None:
    """diymodel/bench measures the model and the harness; neither imports it."""
    for path in PACKAGE.rglob("*.py"):
        imports = re.findall(r"from diymodel\.(\w+)", path.read_text(encoding="utf-8"))
        assert "bench" not in imports or path.parts[len(PACKAGE.parts)] in ("bench", "cli.py"), f"{path} imports bench"


def test_what_old_torch_lacks_is_imported_in_one_place() -> None:
    for path in PACKAGE.rglob("*.py"):
        imports = re.findall(r"^from torch.nn.attention", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not imports or path.name == "_compat.py", f"{path}: torch 2.2 has no torch.nn.attention"


def test_public_names_are_lazy_and_resolve() -> None:
    assert set(dir(diymodel)) == set(diymodel.__all__)
    for name in diymodel.__all__:
        assert getattr(diymodel, name) is not None
    with pytest.raises(AttributeError, match="module 'diymodel' has no attribute 'nothing'"):
        _ = diymodel.nothing


@pytest.mark.parametrize(
    "module", ["config", "cost", "_files", "cli", "verify.options", "bench.command", "bench.compare", "bench.plot"]
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, diymodel.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_counting_flops_does_not_import_the_compiler() -> None:
    """It takes seconds, of the minute in which a stranger gets a verdict."""
    code = (
        "import sys; from diymodel.verify import check_causal_lm; "
        "report = check_causal_lm('tests/examples/my_model.py:LM', profile='quick', only=['decode.cost']); "
        "print(report.verdict, 'torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert run.stdout.split() == ["passed", "False"]


def test_the_table_of_the_tests_names_every_file() -> None:
    """Those that are called as a module of the package need no row of their own."""
    tests = Path(__file__).parent
    named = set(re.findall(r"test_[\w*]+\.py", (tests / "README.md").read_text(encoding="utf-8")))
    modules = {f"test_{path.stem}.py" for path in PACKAGE.rglob("*.py")}
    for path in tests.glob("test_*.py"):
        found = path.name in modules or any(fnmatch.fnmatch(path.name, name) for name in named)
        assert found, f"tests/{path.name} is new: give it a place in the table of tests/README.md"
    for name in named:
        assert list(tests.rglob(name)), f"tests/README.md names {name}, which is not there"


def test_model_reads_in_one_sitting() -> None:
    assert len((PACKAGE / "model.py").read_text(encoding="utf-8").splitlines()) < 400
