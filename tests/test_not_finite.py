"""NaN logits are told once, with the operation that made the first of them; other failures follow from that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.failure import NotApplicable
from diymodel.verify.tolerance import differences

NAN, INF = torch.nan, torch.inf


class Divides(nn.Module):
    """A running sum, divided by weights that are 0 from the fifth token on."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        at = torch.arange(x.shape[1])
        return self.head(self.seen(x, ((at + 1) * (at < 4)).to(x)[:, None]))

    def seen(self, x: Tensor, weights: Tensor) -> Tensor:
        return x + (x * weights).cumsum(1) * weights / weights


class DividesAndLooksAhead(Divides):
    def seen(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().seen(x, weights) + x.sum(1, keepdim=True)


def test_what_follows_from_a_nan_is_no_failure_of_its_own() -> None:
    report = check_causal_lm(Divides, profile="quick")
    assert [result.check.id for result in report.failed] == ["shape.logits"], report.to_text()
    failure = report.failed[0].failure
    assert failure is not None
    assert failure.message.endswith("the first NaN or infinity comes out of div")
    assert failure.values["length"] == 5


def test_another_bug_is_seen_where_there_is_none() -> None:
    report = check_causal_lm(DividesAndLooksAhead, profile="quick", only=("shape.logits", "causality.*"))
    failed = {result.check.id: result.failure for result in report.failed}
    assert {"shape.logits", "causality.edit", "causality.truncation"} <= failed.keys()
    assert failed["causality.edit"] is not None
    assert failed["causality.edit"].values["length"] < 5


@pytest.mark.parametrize(
    ("seen", "expected", "apart"),
    [
        ([1.0, NAN], [1.0, NAN], [0.0, 0.0]),
        ([1.0, INF, -INF], [3.0, INF, -INF], [2.0, 0.0, 0.0]),
        ([1.0, NAN], [1.0, 2.0], [0.0, NAN]),
        ([1.0, 2.0], [1.0, NAN], [0.0, NAN]),
        ([1.0, INF], [1.0, -INF], [0.0, INF]),
    ],
)
def test_the_same_nan_or_infinity_is_no_difference(
    seen: list[float], expected: list[float], apart: list[float]
) -> None:
    found = differences(torch.tensor(seen), torch.tensor(expected))
    torch.testing.assert_close(found, torch.tensor(apart), equal_nan=True)


def test_where_nothing_is_finite_nothing_is_compared() -> None:
    with pytest.raises(NotApplicable, match="there is no finite number to compare"):
        differences(torch.tensor([NAN, INF]), torch.tensor([NAN, INF]))
