"""What is tried to find how a stranger's module is called, and what is said where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.verify import Subject, SubjectError, check_causal_lm
from tests.test_adapters import Tiny, causal

# --- which configuration, which dtype --------------------------------------------------------------------------------


class Causal(Tiny):
    """It is called with token ids, and nothing else is to be found."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, causal)


def always_tied(config: Any) -> nn.Module:
    if not config.tie_word_embeddings:
        raise NotImplementedError("always tied")
    module = Causal(config)
    module.head.weight = module.embed.weight
    return module


def test_a_factory_that_knows_tied_models_only_is_verified() -> None:
    report = check_causal_lm(always_tied, profile="quick", only=["causality.edit", "state.tied*"])
    assert report.verdict == "passed", report.to_text()
    assert {result.status for result in report.results} == {"passed"}


def test_a_factory_that_refuses_all_is_told_what_was_tried() -> None:
    def never(config: Any) -> nn.Module:
        raise NotImplementedError

    tried = r"num_layers=2 num_heads=2 num_kv_heads=1 hidden_size=8; .*each untied and tied, .* 16\), the last with: "
    with pytest.raises(SubjectError, match=tried + "NotImplementedError"):
        _ = Subject(never).convention


class MaskOfFloat32(Tiny):
    """Its mask is float32 for good, and float64's smallest number does not fit into that."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.run(input_ids, causal)
        added = torch.zeros(attention_mask.shape).masked_fill(
            attention_mask == 0, torch.finfo(self.head.weight.dtype).min
        )
        return self.run(input_ids, lambda scores: causal(scores) + added[:, None, None].to(scores.dtype))


def test_float32_is_taken_where_it_can_do_more() -> None:
    subject = Subject(MaskOfFloat32)
    assert subject.convention.dtype == torch.float32
    assert subject.missing("padding") is None


# --- the loss --------------------------------------------------------------------------------------------------------


class LastLoss(Tiny):
    """As in llama2.c: logits come back, and the loss stays behind; an auxiliary loss does as well."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_loss: Tensor | None = None
        self.aux_loss: Tensor | None = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.run(tokens, causal)
        self.aux_loss = logits.square().mean()
        self.last_loss = None if targets is None else self.loss(logits, targets)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Within(nn.Module):
    """The part that keeps the loss is not the whole."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = LastLoss(config)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.model(tokens, targets)


class HalvedLoss(LastLoss):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().loss(logits, targets) / 2


class LossOfEachToken(LastLoss):
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")


@pytest.mark.parametrize(("module", "path"), [(LastLoss, "last_loss"), (Within, "model.last_loss")])
def test_a_loss_that_is_left_on_the_module_is_found(module: type[nn.Module], path: str) -> None:
    described = Subject(module).convention.describe()
    assert described == (
        f"forward(tokens, targets); targets come shifted by the caller, -1 is ignored; the loss is left in {path}"
    )
    report = check_causal_lm(module, profile="quick", only=["loss.*"])
    assert report.verdict == "passed", report.to_text()
    passed = {result.check.id for result in report.results if result.status == "passed"}
    assert {"loss.value", "loss.gradient", "loss.micro_batches_add_up"} <= passed


def test_a_wrong_loss_that_is_left_on_the_module_is_seen() -> None:
    report = check_causal_lm(HalvedLoss, profile="quick", only=["loss.value"])
    assert report.verdict == "failed"


def test_without_a_loss_it_is_said_what_to_write() -> None:
    subject = Subject(LossOfEachToken)
    assert "targets come" not in subject.convention.describe()
    assert subject.missing("loss") == (
        "forward(targets=…) returned no scalar loss, and left none in an attribute; let it return (logits, loss), or "
        "write Subject(…, loss=lambda logits, labels: …)"
    )
