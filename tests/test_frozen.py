"""Weights that are frozen, empty or equal, and modules that cannot be copied: what a check says of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from tests.test_adapters import Tiny, causal


class Adapted(Tiny):
    """As for LoRA: what is loaded later is frozen, and undefined until then."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        self.adapter = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        for parameter in (self.bias, self.embed.weight):
            parameter.requires_grad = False

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal) + self.head(self.adapter(self.embed(input_ids) + self.bias))


def test_a_frozen_vector_that_its_constructor_leaves_undefined_is_drawn() -> None:
    report = check_causal_lm(Adapted, profile="quick", only=("shape.logits", "gradients.*"))
    assert not report.failed, report.to_text()
    statuses = {result.check.id: result.status for result in report.results}
    assert statuses["shape.logits"] == statuses["gradients.reach_every_parameter"] == "passed"
    (absent,) = (result for result in report.results if result.check.id == "gradients.absent_tokens_zero")
    assert (absent.status, absent.reason) == ("skipped", "the token embedding is frozen")


class WeightNormed(Tiny):
    """torch.nn.utils.weight_norm leaves the product in an attribute, with its graph."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(()))
        self.scaled = self.gain * torch.ones(config.hidden_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        self.scaled = self.gain * torch.ones(1)
        return self.run(input_ids, causal) * self.scaled


def test_where_a_module_cannot_be_copied_the_failure_speaks_for_itself() -> None:
    report = check_causal_lm(WeightNormed, profile="quick", only=("state.deepcopy", "state.tied_weights_stay_tied"))
    copied, tied = report.results
    assert (copied.status, tied.status) == ("failed", "skipped"), report.to_text()
    assert copied.failure is not None
    assert "the module cannot be copied: RuntimeError: Only Tensors created explicitly" in copied.failure.message
    assert not copied.failure.likely_causes
    assert (tied.reason or "").startswith("the module cannot be copied: ")


class Cloned(Tiny):
    """Experts that begin as copies of one, with a row for each of as many inner features as there are tokens."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        expert = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.run(input_ids, causal)
        return sum((expert(self.embed(input_ids)) for expert in self.experts), logits)


def test_copies_of_an_expert_are_no_lost_tie() -> None:
    report: Any = check_causal_lm(Cloned, profile="quick", only=("state.tied_weights_stay_tied",))
    assert [result.status for result in report.results] == ["skipped"], report.to_text()


class NoneInside(Tiny):
    """A width that is rounded down, to none in a tiny model."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.inner = nn.Parameter(torch.empty(config.hidden_size, config.hidden_size // 64))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal) + self.head((self.embed(input_ids) @ self.inner).tanh() @ self.inner.T)


def test_a_parameter_without_elements_has_nothing_to_learn() -> None:
    only = ("gradients.*", "training.optimizer_is_complete")
    report = check_causal_lm(NoneInside, profile="quick", only=only)
    assert {result.status for result in report.results} == {"passed", "skipped"}, report.to_text()
