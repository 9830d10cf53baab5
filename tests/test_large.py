"""Large scores and logits: what lets the future in, what overflows, and what is rounding alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.report import Failure

SCORES, FINITE, LOSS = "causality.large_scores", "numerics.large_scores_finite", "loss.large_logits"


class Attends(nn.Module):
    """One layer of one head with a bias for the distance, and a loss."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.norm = nn.Embedding(config.vocab_size, d), nn.LayerNorm(d)
        self.qkv, self.head = nn.Linear(d, 3 * d), nn.Linear(d, config.vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        x = self.entering(self.norm(self.embed(input_ids)), input_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        at = torch.arange(x.shape[1])
        ages = (at[:, None] - at).to(x)
        logits: Tensor = self.head(x + self.weights(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 - ages, ages < 0) @ v)
        return logits if labels is None else (logits, self.loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    def entering(self, x: Tensor, ids: Tensor) -> Tensor:
        return x

    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


class CapsBehindTheMask(Attends):
    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return (50 * (scores.masked_fill(hidden, -1e30) / 50).tanh()).softmax(-1)


class AddsTenThousand(Attends):
    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return (scores + hidden * -1e4).softmax(-1)


class AddsABillion(Attends):
    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return (scores + hidden * -1e9).softmax(-1)


class ByHand(Attends):
    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        powers = self.shifted(self.masked(scores, hidden)).exp()
        return powers / powers.sum(-1, keepdim=True)

    def masked(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return scores.masked_fill(hidden, -torch.inf)

    def shifted(self, scores: Tensor) -> Tensor:
        return scores


class ByHandWithoutTheLargest(ByHand):
    def shifted(self, scores: Tensor) -> Tensor:
        return scores - scores.amax(-1, keepdim=True)


class ByHandAddsTenThousand(ByHandWithoutTheLargest):
    def masked(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return scores + hidden * -1e4


class ByHandAddsABillion(ByHandWithoutTheLargest):
    def masked(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return scores + hidden * -1e9


class LogOfProbabilities(Attends):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.nll_loss((logits.softmax(-1) + 1e-30).log(), labels)


class RoundsByWhatFollows(Attends):
    """As where rows of several lengths are computed in other kernels: float32, whose rounding later tokens decide."""

    def entering(self, x: Tensor, ids: Tensor) -> Tensor:
        step = torch.finfo(torch.float32).eps * (ids.sum() % 5 - 2)
        return x.float().to(x.dtype) * (1 + step)


class NoAttention(Attends):
    def weights(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return (~hidden).to(scores) / (~hidden).to(scores).sum(-1, keepdim=True)


def failures(module: type[nn.Module], *checks: str) -> dict[str, Failure | None]:
    report = check_causal_lm(module, profile="quick", only=checks)
    return {result.check.id: result.failure for result in report.failed}


def statuses(module: type[nn.Module], *checks: str) -> set[str]:
    return {result.status for result in check_causal_lm(module, profile="quick", only=checks).results}


@pytest.mark.parametrize("module", [Attends, AddsABillion, ByHandAddsABillion])
def test_right_ones_pass(module: type[nn.Module]) -> None:
    assert statuses(module, SCORES, FINITE, LOSS, "causality.edit") == {"passed"}


@pytest.mark.parametrize("module", [CapsBehindTheMask, AddsTenThousand, ByHandAddsTenThousand])
def test_a_mask_that_large_scores_reach_is_seen(module: type[nn.Module]) -> None:
    assert failures(module, SCORES, "causality.edit").keys() == {SCORES}


def test_a_softmax_that_overflows_is_seen_where_it_does() -> None:
    (failure,) = failures(ByHand, FINITE, "shape.logits").values()
    assert failure is not None
    assert failure.message.endswith("the first NaN or infinity comes out of exp")
    assert statuses(ByHandWithoutTheLargest, FINITE, SCORES) == {"passed"}


def test_the_logarithm_of_a_probability_is_seen() -> None:
    assert failures(LogOfProbabilities, LOSS, "loss.value").keys() == {LOSS}


def test_what_rounding_decides_is_no_leak() -> None:
    assert statuses(RoundsByWhatFollows, "causality.edit") == {"passed"}
    assert statuses(RoundsByWhatFollows, SCORES) <= {"passed", "skipped"}


def test_without_attention_there_are_no_scores() -> None:
    assert statuses(NoAttention, SCORES, FINITE) == {"skipped"}
