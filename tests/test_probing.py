"""What is tried to find how a stranger's module is called, and what is said where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
