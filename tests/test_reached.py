"""Healthy models some of whose parameters get no gradient from the logits of a few tokens, and broken ones beside."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

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
