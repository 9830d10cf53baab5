"""A check that tries several ways fails where one of them alone is wrong."""

from __future__ import annotations

from diymodel.verify.report import Failure
from diymodel.verify.runner import Settings, verify_one
from diymodel.zoo.base import BASES
from tests.meta.verdicts import CHECKS, EXAMPLES


def failure(base: str, check_id: str, *changes: tuple[str, str]) -> Failure:
    """Of a check on a base with these changes."""
    source = BASES[base].source
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    result = verify_one(BASES[base].subject(source), CHECKS[check_id], Settings(EXAMPLES))
    assert result.failure is not None, result
    return result.failure


def test_only_the_names_under_data_parallel_are_wrong() -> None:
    found = failure(
        "pretrained",
        "checkpoint.wrapped",
        ("    model = getattr(model,", '    prefix = "module." * hasattr(model, "module")\n    model = getattr(model,'),
        ("model.state_dict()}, path)", "{prefix + name: value for name, value in model.state_dict().items()}}, path)"),
    )
    assert "in DataParallel must load" in found.message
