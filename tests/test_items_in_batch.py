"""Models that transformers' Trainer tells how many labels all micro-batches hold: by name, or through ``**kwargs``."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from diymodel.verify import check_causal_lm
from tests.test_adapters import Tiny, causal


class Swallows(Tiny):
    """A stranger's forward with room for anything; nobody tells it the number."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.run(input_ids, causal)
        if labels is None:
            return logits
        scored, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return logits, F.cross_entropy(scored, wanted, reduction="sum") / self.number(wanted, **kwargs)

    def number(self, wanted: Tensor, **kwargs: Any) -> Any:
        return (wanted != -100).sum()


class OfTransformers(Swallows):
    """Trainer tells it, as every model that has this and room."""

    loss_function = None


class SaysThatItTakesNone(OfTransformers):
    accepts_loss_kwargs = False


class Divides(OfTransformers):
    def number(self, wanted: Tensor, **kwargs: Any) -> Any:
        return kwargs.get("num_items_in_batch") or super().number(wanted)


@pytest.mark.parametrize(
    ("module", "status"),
    [(Swallows, "skipped"), (SaysThatItTakesNone, "skipped"), (OfTransformers, "failed"), (Divides, "passed")],
)
def test_who_is_told_the_number_divides_by_it(module: type[Tiny], status: str) -> None:
    report = check_causal_lm(module, profile="quick", only=("loss.items_in_batch", "loss.value"))
    assert {result.check.id: result.status for result in report.results} == {
        "loss.value": "passed",
        "loss.items_in_batch": status,
    }
