"""Modules that write ``train`` and ``eval`` themselves."""

from __future__ import annotations

from typing import Any

import pytest
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
