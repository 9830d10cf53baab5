"""Labels that nobody shifts inside, under a name whose labels are shifted inside elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import Tiny, causal


class OverAllPositions(Tiny):
    """gigaGPT's: its data shifts the labels, and the sum is divided by all positions, ignored ones as well."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.run(input_ids, causal)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.numel()


@pytest.mark.parametrize(
    ("subject", "bug"),
    [
        (OverAllPositions, "labels-not-shifted"),
        (Subject(OverAllPositions, labels_come_shifted=True), "loss-wrong-denominator"),
    ],
)
def test_what_is_wrong_is_told_before_and_after_it_is_said_who_shifts(subject: Any, bug: str) -> None:
    report = check_causal_lm(subject, profile="quick", only=("loss.*",))
    assert report.diagnosis[0].bug == bug, report.to_text()
    assert report.diagnosis[0].score > 0.9
