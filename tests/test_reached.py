"""Healthy models some of whose parameters get no gradient from the logits of a few tokens, and broken ones beside."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm, reaching
from tests.test_adapters import Tiny, causal
from tests.test_healthy_strangers import passes

REACH = "gradients.reach_every_parameter"


class Healthy(Tiny):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal)


def test_the_graph_is_walked_only_where_something_is_without_gradient() -> None:
    with mock.patch.object(reaching, "only_added", side_effect=AssertionError):
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


class BiasedChoice(Mixture):
    """As DeepSeek-V3's: what is added to the scores decides which expert is asked, and not how much it counts."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.expert_bias = nn.Parameter(torch.zeros(2))

    def mixed(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        chosen = F.one_hot((scores + self.expert_bias).argmax(-1), 2).to(x)
        return sum((expert(x) * w for expert, w in zip(self.experts, (scores * chosen).split(1, -1), strict=True)), x)


class BiasedWeights(BiasedChoice):
    """The bias counts, and is cut off."""

    def mixed(self, x: Tensor) -> Tensor:
        return super().mixed(x) * (1 + self.expert_bias.detach().sum())


class ChoiceAlone(BiasedChoice):
    """The router itself only chooses."""

    def mixed(self, x: Tensor) -> Tensor:
        chosen = F.one_hot((self.router(x) + self.expert_bias).argmax(-1), 2).to(x)
        return sum((expert(x) * w for expert, w in zip(self.experts, chosen.split(1, -1), strict=True)), x)


class BiasUnused(BiasedChoice):
    def mixed(self, x: Tensor) -> Tensor:
        return Mixture.mixed(self, x)


def test_a_bias_that_only_chooses_experts_needs_no_gradient() -> None:
    passes(BiasedChoice, REACH, seeds=1)


@pytest.mark.parametrize(
    ("module", "names"),
    [(BiasedWeights, "expert_bias"), (ChoiceAlone, "router.weight"), (BiasUnused, "expert_bias")],
)
def test_choosing_excuses_nothing_else(module: type[nn.Module], names: str) -> None:
    assert unreached(module) == names


class TwoAhead(Tiny):
    """A second head predicts the token after the next, and only the loss asks it."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.after_next = nn.Linear(config.vocab_size, config.vocab_size)

    def forward(self, input_ids: Tensor, return_loss: bool = False) -> Any:
        logits = self.run(input_ids, causal)
        if not return_loss:
            return logits
        further = F.cross_entropy(self.after_next(logits)[:, :-2].flatten(0, 1), input_ids[:, 2:].flatten())
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()) + 0.1 * further, further


class Labelled(TwoAhead):
    """The same with labels, and in training mode alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.run(input_ids, causal)
        if labels is None:
            return logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if self.training:
            loss = loss + F.cross_entropy(self.after_next(logits)[:, :-2].flatten(0, 1), labels[:, 2:].flatten())
        return loss, logits


class NeverAsked(Labelled):
    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.third = nn.Linear(2, 2)


class Balanced(Mixture):
    """The router is cut off from the logits; what balances the experts is its only gradient."""

    def mixed(self, x: Tensor) -> Tensor:
        self.balance = self.router(x).softmax(-1).mean((0, 1)).square().sum()
        chosen = F.one_hot(self.router(x).argmax(-1), 2).to(x)
        return sum((expert(x) * w for expert, w in zip(self.experts, chosen.split(1, -1), strict=True)), x)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.run(input_ids, causal) + self.head(self.mixed(self.embed(input_ids)))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) + self.balance, logits


@pytest.mark.parametrize("module", [TwoAhead, Labelled])
def test_a_head_that_serves_the_loss_alone_is_reached(module: type[nn.Module]) -> None:
    passes(module, REACH, seeds=1)


@pytest.mark.parametrize(("module", "names"), [(NeverAsked, "third.bias, third.weight"), (Balanced, "router.weight")])
def test_the_loss_excuses_nothing_else(module: type[nn.Module], names: str) -> None:
    assert unreached(module) == names


class Further(Tiny):
    """A head for the token after next hands its logits over beside the first, and no loss knows them."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.after_next = nn.Linear(config.vocab_size, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.run(input_ids, causal)
        return logits, torch.stack([self.after_next(logits)], 1)


class FurtherMoving(Further):
    """Each call moves a bias by hand, so that no two give the same."""

    def forward(self, input_ids: Tensor) -> Any:
        self.head.bias.data += 1e-3
        return super().forward(input_ids)


class FurtherUnasked(Further):
    """One more such head is never called, and what comes beside the logits has another width."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.third = nn.Linear(config.vocab_size, config.vocab_size)
        self.states = nn.Linear(config.vocab_size, config.vocab_size + 1)

    def forward(self, input_ids: Tensor) -> Any:
        logits, further = super().forward(input_ids)
        return logits, further, self.states(logits)


class FurtherBalanced(Mixture):
    """The router is cut off from the logits; those of the token after next alone teach it."""

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        chosen = F.one_hot(self.router(x).argmax(-1), 2).to(x)
        mixed = sum((expert(x) * w for expert, w in zip(self.experts, chosen.split(1, -1), strict=True)), x)
        logits = self.run(input_ids, causal) + self.head(mixed)
        return logits, logits * self.router(x).sum(-1, keepdim=True)


@pytest.mark.parametrize("module", [Further, FurtherMoving])
def test_a_head_that_hands_over_further_logits_is_reached(module: type[nn.Module]) -> None:
    passes(module, REACH, seeds=1)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (FurtherUnasked, "states.bias, states.weight, third.bias, third.weight"),
        (FurtherBalanced, "router.weight"),
    ],
)
def test_further_logits_excuse_nothing_else(module: type[nn.Module], names: str) -> None:
    assert unreached(module) == names


class Layered(Tiny):
    """One router for all layers, which every ``period``-th layer asks, and a last layer that may be forgotten."""

    period, forgotten = 2, 0

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.router = nn.Linear(d, 1, bias=False)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for i in range(len(self.layers) - self.forgotten):
            y = self.layers[i](x)
            x = x + (y * self.router(x).sigmoid() if i % self.period == self.period - 1 else y)
        return self.run(input_ids, causal) + self.head(x)


class EveryFourth(Layered):
    period = 4


class LastForgotten(Layered):
    forgotten = 1


class NeverRouted(Layered):
    period = 100


class NoFurtherLayers(Layered):
    """Its layers are counted by a table of its own."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__(config)
        self.scales = [1.0, 0.5, 0.25]

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.scales[len(self.layers) - 1]


@pytest.mark.parametrize("module", [Layered, EveryFourth])
def test_what_further_layers_use_is_reached(module: type[nn.Module]) -> None:
    passes(module, REACH, seeds=1)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (LastForgotten, "layers.0.bias, layers.0.weight"),
        (NeverRouted, "router.weight"),
        (NoFurtherLayers, "router.weight"),
    ],
)
def test_what_further_layers_do_not_use_either_is_not_reached(module: type[nn.Module], names: str) -> None:
    assert unreached(module) == names
