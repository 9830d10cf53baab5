"""Result files: one JSON document each, which says what was measured, where, and by which command. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diymodel._files import replace_text
from diymodel.bench.figures import Fit, Spread

SCHEMA = 2


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all; missing directories are made.

    Raises:
        TypeError: it holds something that is no figure.
    """
    content = json.dumps(document, indent=1, ensure_ascii=False, default=_plain) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, content)


def read_results(path: Path, *benchmarks: str) -> dict[str, Any]:
    """The document in a file that ``diymodel bench`` wrote.

    Args:
        benchmarks: names of the benchmarks whose results will do; none: all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or holds something else.
    """
    wanted = " or ".join(f"`diymodel bench {name}`" for name in benchmarks) or "`diymodel bench`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}: expected a file that {wanted} wrote with --json") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = document.get("benchmark") if isinstance(document, dict) else None
    if found is None or document.get("schema") != SCHEMA or (benchmarks and found not in benchmarks):
        what = "something else" if found is None else f"{found!r} in schema {document.get('schema')!r}"
        raise ValueError(f"{path} is no result that {wanted} of schema {SCHEMA} wrote: it holds {what}")
    result: dict[str, Any] = document
    return result


def finish(document: Mapping[str, Any], path: Path | None) -> None:
    """What every measurement ends with: the file, if one is wanted, and the same document as the last line printed."""
    if path is not None:
        write_results(path, document)
    print(json.dumps(document, ensure_ascii=False, default=_plain))


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it is read back from a file."""
    result: dict[str, Any] = json.loads(json.dumps(document, default=_plain))
    return result


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, (Spread, Fit)):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} does not belong in a results file")
