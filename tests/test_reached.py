"""Healthy models some of whose parameters get no gradient from the logits of a few tokens, and broken ones beside."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.checks import gradients_reach
from tests.test_adapters import Tiny, causal
from tests.test_healthy_strangers import passes

REACH = "gradients.reach_every_parameter"


class Healthy(Tiny):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)


def test_the_graph_is_walked_only_where_something_is_without_gradient() -> None:
    with mock.patch.object(gradients_reach, "only_added", side_effect=AssertionError):
        passes(Healthy, REACH, seeds=1)


class Mixture(Tiny):
    """As DeepSeek's: in eval mode the experts are called one by one, under no_grad."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.router = nn.Linear(config.hidden_size, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))

    def mixed(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        parts = [expert(x) * weights[..., [i]] for i, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def moe_infer(self, x: Tensor) -> Tensor:
        return self.mixed(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.run(input_ids, causal) + self.head(self.mixed(x) if self.training else self.moe_infer(x))


class NeverMixed(Mixture):
    """The router's weight of each expert is divided by itself, in training mode as well."""

    def mixed(self, x: Tensor) -> Tensor:
        weights = self.router(x).exp()
        return sum((expert(x) * (w / w) for expert, w in zip(self.experts, weights.split(1, -1), strict=True)), x)


def unreached(module: Any) -> str:
    (result,) = check_causal_lm(module, profile="quick", only=[REACH]).failed
    assert result.failure is not None
    return result.failure.message.partition("saw none at ")[2]


def test_what_learns_in_training_mode_alone_is_reached() -> None:
    passes(Mixture, REACH, seeds=1)


def test_what_learns_in_neither_mode_is_not_reached() -> None:
    assert unreached(NeverMixed) == "router.weight"
