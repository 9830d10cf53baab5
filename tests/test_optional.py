"""What is slow or not everybody's runs where it is asked for, and says so where it does not."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from diymodel.cli import main
from diymodel.verify import Subject, check_causal_lm, list_checks
from diymodel.verify.registry import Check
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.verify.trial import Trial
from diymodel.zoo.base import BASES

OPTIONAL = [check for check in list_checks() if check.optional]
ASKED_FOR = "optional: it runs where it is named (--only, in pytest -k)"


def test_optional_checks_are_skipped_with_the_way_to_run_them() -> None:
    assert OPTIONAL
    for check in OPTIONAL:
        result = verify_one(resolve(None), check, Settings.of())
        assert (result.status, result.reason) == ("skipped", ASKED_FOR)


def test_optional_checks_run_by_name() -> None:
    report = check_causal_lm(BASES["startpos"].subject(), profile="quick", only=["compile.*"], step="3.2")
    assert [result.check for result in report.results] == OPTIONAL
    assert ASKED_FOR not in {result.reason for result in report.results}


def test_the_list_says_which_checks_are_optional(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.endswith("(optional: name it with --only)")] == [
        check.id for check in OPTIONAL
    ]


def test_an_optional_check_draws_a_tenth_of_the_trials() -> None:
    def count(optional: bool) -> int:
        def draw(trial: Trial) -> None:
            trial.draw("number", st.integers())

        return verify_one(resolve(None), Check("x.y", "x", "1.1", (), (), draw, optional), Settings(30)).examples

    assert count(optional=True) <= 3 < count(optional=False)


def test_save_without_load_is_refused() -> None:
    with pytest.raises(ValueError, match="so give both"):
        Subject(lambda config: None, save=lambda module, path: None)  # type: ignore[arg-type,return-value]
