"""Features of which most are zero, so that under many weights two tokens do not meet, and their order tells nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify import check_causal_lm
from diymodel.verify.checks import sensitivity


class FastWeights(nn.Module):
    """The delta rule over products of neighbouring features: what was stored under a key is replaced."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.qkv = nn.Linear(d, 3 * d, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = self.features(q), self.features(k)
        stored, out = torch.zeros(len(x), k.shape[-1], v.shape[-1]).to(x), []
        for t in range(x.shape[1]):
            found = (k[:, t, None] @ stored)[:, 0]
            stored = stored + k[:, t, :, None] * (v[:, t] - found)[:, None]
            out.append((q[:, t, None] @ stored)[:, 0])
        return self.head(x + torch.stack(out, 1))

    def features(self, x: Tensor) -> Tensor:
        both = torch.cat((x, -x), -1).relu()
        return both * both.roll(1, -1)


class WithoutOrder(FastWeights):
    """What is stored is added to."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        stored = (self.features(k)[..., None] * v[..., None, :]).cumsum(1)
        return self.head(x + (self.features(q)[..., None, :] @ stored)[..., 0, :])


def failures(module: type[nn.Module]) -> int:
    reports = [check_causal_lm(module, profile="quick", only=("sensitivity.order_matters",), seed=s) for s in range(3)]
    return sum(report.verdict == "failed" for report in reports)


def test_order_is_given_more_weights_than_a_few_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(FastWeights) == 0
    assert failures(WithoutOrder) == 3
    monkeypatch.setattr(sensitivity, "_WEIGHTS", 4)
    assert failures(FastWeights) > 0
