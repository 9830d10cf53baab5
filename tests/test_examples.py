"""The strangers' files of the README: the broken one differs from the healthy one in the line that is meant."""

from __future__ import annotations

import difflib
from pathlib import Path

from diymodel.verify import check_causal_lm

EXAMPLES = Path(__file__).parent / "examples"


def test_the_broken_model_has_one_bug_and_it_is_named() -> None:
    healthy, broken = ((EXAMPLES / f"{name}_model.py").read_text("utf-8").splitlines()[1:] for name in ("my", "broken"))
    changed = [line for line in difflib.ndiff(healthy, broken) if line[0] in "+-"]
    assert [line[2:].strip() for line in changed] == [
        "position = torch.arange(P, P + T, device=input_ids.device)",
        "position = torch.arange(T, device=input_ids.device)",
    ]

    report = check_causal_lm(f"{EXAMPLES / 'broken_model.py'}:LM", profile="quick", only=["decode.cached_equals_full"])
    (failed,) = report.failed
    assert failed.failure is not None
    assert failed.failure.likely_causes[0] == "position-restarts-in-decode"
