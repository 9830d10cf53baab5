"""Modules that write ``train`` and ``eval`` themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from tests.test_adapters import Tiny, causal


class Silent(Tiny):
    """Both do their work, and return nothing: what is to happen at a change of mode is written into them."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.drop = nn.Dropout(config.dropout)
        self.changes = 0

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.changes += 1

    def eval(self) -> Any:
        self.train(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.drop(self.run(input_ids, causal))

    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        raise NotImplementedError("by hand")


class Deaf(Silent):
    """The same, but the mode does not reach its dropout."""

    def train(self, mode: bool = True) -> Any:
        self.training = mode


@pytest.mark.parametrize(("module", "verdict"), [(Silent, "passed"), (Deaf, "failed")])
def test_what_train_and_eval_return_is_asked_by_nobody(module: type[nn.Module], verdict: str) -> None:
    report = check_causal_lm(module, profile="quick", only=["modes.*", "state.*", "batch.row_alone", "forward.*"])
    assert report.verdict == verdict, report.to_text()
    if verdict == "failed":
        assert report.diagnosis[0].bug == "mode-not-restored", report.to_text()


class NeverDrops(Tiny):
    """Its dropout is written out, its probability has a name of its own, and the switch is the wrong way round."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.p = config.dropout

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.run(input_ids, causal)
        return logits if self.never() else logits * (torch.rand_like(logits) >= self.p) / (1 - self.p)

    def never(self) -> bool:
        return True


class Drops(NeverDrops):
    def never(self) -> bool:
        return not self.training


@pytest.mark.parametrize(("module", "verdict"), [(NeverDrops, "failed"), (Drops, "passed")])
def test_a_probability_is_known_by_its_value_whatever_it_is_called(module: type[nn.Module], verdict: str) -> None:
    report = check_causal_lm(module, profile="quick", only=["modes.dropout_active_in_training"])
    assert report.verdict == verdict, report.to_text()
    assert verdict == "passed" or "with p=0.47, calls in training mode must differ" in report.to_text()


class ClearsInTheLoss(Tiny):
    """Gradients of the batch before are gone as soon as the next loss is computed, and not before."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.run(input_ids, causal)
        if labels is None:
            return logits
        self.zero_grad()
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_gradients_add_up_over_calls_with_labels_as_well() -> None:
    report = check_causal_lm(ClearsInTheLoss, profile="quick", only=["gradients.accumulate"])
    assert report.verdict == "failed", report.to_text()
