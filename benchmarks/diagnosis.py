"""What the README shows of the diagnosis: a run that fails, four bugs in models outside the zoo, one lesson.

python -m benchmarks.diagnosis benchmarks/results/diagnosis.txt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from diymodel._files import replace_text
from diymodel._machine import describe_machine
from diymodel.verify import check_causal_lm
from diymodel.verify.text import diagnosis_lines
from diymodel.zoo.lesson import lesson

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "tests" / "examples"
LESSON = "labels-shifted-twice"


class Try(NamedTuple):
    """A bug in a model that no diagnosis has learned from."""

    file: str  # in tests/examples
    name: str
    old: str  # the line …
    new: str  # … and what becomes of it
    slug: str  # the class that it is of

    def plant(self, folder: Path) -> str:
        """Write the model with the bug; the subject's name for ``diymodel verify``."""
        source = (EXAMPLES / self.file).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, self
        path = folder / self.file
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")
        return f"{path}:{self.name}"


TRIES = [
    Try(
        "multi_query.py",
        "MultiQuery",
        "[:, :-1].flatten(0, 1), labels[:, 1:].flatten()",
        ".flatten(0, 1)[:-1], labels.flatten()[1:]",
        "labels-flattened-before-shift",
    ),
    Try("multi_query.py", "MultiQuery", "s.softmax(-1)", "s.softmax(-2)", "softmax-wrong-axis"),
    Try("multi_query.py", "MultiQuery", "triu(S - T + 1)", "triu(S - T + 2)", "mask-sees-next-token"),
    Try("nano_gpt.py", "GPT", "self.dropout if self.training else 0.0", "self.dropout", "dropout-active-in-eval"),
]


def shown() -> Iterator[str]:
    """The text, part by part."""
    machine = describe_machine(torch.device("cpu"))
    facts = ("cpu", "cores", "python", "torch", "date", "commit")
    yield f"# python -m benchmarks.diagnosis; {', '.join(f'{fact} {machine[fact]}' for fact in facts)}"
    yield "\n# diymodel verify tests/examples/broken_model.py:LM\n"
    yield check_causal_lm(f"{EXAMPLES / 'broken_model.py'}:LM").to_text()
    for one in TRIES:
        yield f"\n# {one.file}: {one.old}\n#       -> {one.new}; --profile quick\n"
        with tempfile.TemporaryDirectory() as folder:
            report = check_causal_lm(one.plant(Path(folder)), profile="quick")
        yield from diagnosis_lines(report)
    yield f"\n# diymodel zoo show {LESSON}\n"
    yield lesson(LESSON)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(line.rstrip() for part in shown() for line in part.splitlines())
    replace_text(args.file, f"{text}\n".replace(f"{ROOT}/", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
