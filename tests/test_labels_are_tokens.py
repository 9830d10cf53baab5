"""A loss by hand that looks every label up, so that none can be ignored: it is checked with tokens alone."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import Tiny, causal, verdicts

CHECKED = ("loss.value", "loss.gradient", "loss.many_labels", "loss.micro_batches_add_up", "loss.pad_token_scored")


class Shifted(Tiny):
    """Its caller shifts the labels, as nanoGPT's does, and cuts the last token off."""

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.run(input_ids, causal)
        return logits if targets is None else (logits, self.loss(logits, targets))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()


class Unshifted(Shifted):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = self.run(input_ids, causal)
        return logits if labels is None else (logits, self.loss(logits[:, :-1], labels[:, 1:]))


class SumsRows(Shifted):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) * targets.shape[1]


@pytest.mark.parametrize(("module", "come_shifted"), [(Shifted, True), (Unshifted, False)])
def test_a_loss_that_ignores_no_label_is_checked(module: Any, come_shifted: bool) -> None:
    found = Subject(module).convention
    assert (found.labels_are_tokens, found.labels_come_shifted) == (True, come_shifted)
    assert ", none can be ignored" in found.describe()
    assert "no label can be ignored: forward(" in found.missing["labels"]
    statuses = verdicts(module, ("loss.*", "gradients.*", "training.*"))
    assert {statuses[id] for id in CHECKED} == {"passed"}
    assert statuses["loss.all_ignored"] == "skipped"


def test_a_wrong_one_is_seen() -> None:
    report = check_causal_lm(SumsRows, profile="quick", only=("loss.*",))
    assert {"loss.value", "loss.gradient"} <= {result.check.id for result in report.failed}
