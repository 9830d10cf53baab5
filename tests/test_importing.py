"""A subject's file is imported as Python would run it, and leaves other modules as they are."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from diymodel.verify.importing import import_named


def written(folder: Path, name: str, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text, "utf-8")
    return f"{folder / name}.py"


def test_files_of_one_name_import_each_its_own_neighbours(tmp_path: Path) -> None:
    specs = []
    for who in ("first", "second"):
        written(tmp_path / who, "layers_beside", f"WHO = {who!r}")
        specs.append(written(tmp_path / who, "model_beside", "from layers_beside import WHO") + ":WHO")
    assert [import_named(spec) for spec in (*specs, *specs)] == ["first", "second"] * 2


def test_a_file_with_the_name_of_another_module_takes_nobodys_place(tmp_path: Path) -> None:
    spec = written(tmp_path, "random", "import dataclasses\n@dataclasses.dataclass\nclass Size:\n    width: int = 3")
    found = import_named(f"{spec}:Size")
    assert found().width == 3
    assert sys.modules["random"] is random
    assert vars(sys.modules[found.__module__])["Size"] is found
