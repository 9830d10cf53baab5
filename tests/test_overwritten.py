"""A backward pass that needs what was written over: the line is told, once, and the diagnosis names it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from diymodel.verify import check_causal_lm
from diymodel.verify.registry import list_checks
from diymodel.verify.report import Result
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject
from tests.test_probing import Causal

CHECKS = {check.id: check for check in list_checks()}


class AddsInPlace(Causal):
    """The residual that a norm has seen is added to."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x += self.norm(x)
        return self.head(x.cumsum(1))


class FillsABuffer(Causal):
    """A slice is written to that another product has saved; what is written is of another shape."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * 1
        y = x * x
        x[:, :1] = 0
        return self.head((y + x).cumsum(1))


def reached(factory: Any) -> Result:
    return verify_one(Subject(factory), CHECKS["gradients.reach_every_parameter"], Settings(5))


@pytest.mark.parametrize(
    ("factory", "end"),
    [(AddsInPlace, r"; written over by `x += self.norm(x)` ("), (FillsABuffer, "; written over by `x[:, :1] = 0` (")],
)
def test_the_line_that_writes_over_it_is_told(factory: Any, end: str) -> None:
    result = reached(factory)
    assert result.failure is not None, result
    assert end in result.failure.message
    assert "Hint" not in result.failure.message
    assert result.failure.likely_causes == ("saved-tensor-overwritten",)


def test_checks_that_meet_the_same_line_are_reported_as_one_and_the_bug_is_named() -> None:
    report = check_causal_lm(Subject(AddsInPlace), profile="quick", only=["gradients.*", "causality.gradient"])
    (first, others), *further = report.failed_apart
    assert (first.check.id, further) == ("causality.gradient", [])
    assert {"gradients.finite", "gradients.accumulate"} <= {*others}
    assert report.diagnosis[0].bug == "saved-tensor-overwritten"
