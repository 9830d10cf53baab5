"""Healthy models that round, or draw, where it shows, and what must still be found in them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify.checks import numerics
from diymodel.verify.failure import CheckFailure
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import replay, run_check
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.verify.tolerance import table_noise
from diymodel.verify.trial import Trial

ROWS = {"rows": 2, "length": 4, "tokens": [[0, 1, 2, 3], [4, 5, 6, 7]]}


class Mixture(nn.Module):
    """Each token goes to one of four experts; a fixed router, so that no measured rounding shows another choice."""

    def __init__(self, vocab_size: int, hidden_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_seq_len, hidden_size)
        self.register_buffer("router", torch.linspace(1, 3, 4 * vocab_size).view(4, vocab_size).sin())
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(4))
        self.head = nn.Linear(hidden_size, vocab_size)

    def place(self, position: Tensor) -> Tensor:
        return self.positions(position)  # type: ignore[no-any-return]

    def chosen(self, scores: Tensor) -> Tensor:
        return torch.zeros_like(scores).scatter(-1, scores.topk(1).indices, 1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        scores = 2 + (self.router.T[input_ids] * 1e-3).cos()  # too near to each other for bfloat16
        chosen = self.chosen(scores).to(x).split(1, -1)
        return self.head(x + sum(4 * e(x) * w for e, w in zip(self.experts, chosen, strict=True)))  # type: ignore[no-any-return]


class ByMax(Mixture):
    def chosen(self, scores: Tensor) -> Tensor:
        return F.one_hot(scores.max(-1)[1], 4)


class ByMaxKept(Mixture):
    def chosen(self, scores: Tensor) -> Tensor:
        return F.one_hot(scores.max(dim=-1, keepdim=True)[1].squeeze(-1), 4)


class ByArgmax(Mixture):
    def chosen(self, scores: Tensor) -> Tensor:
        return F.one_hot(scores.argmax(-1), 4)


class ByThreshold(Mixture):
    def chosen(self, scores: Tensor) -> Tensor:
        return scores >= scores.topk(2)[0][..., -1:]


class ByRank(Mixture):
    def chosen(self, scores: Tensor) -> Tensor:
        return scores.ge(torch.sort(scores, descending=True).values[..., :1])


class NarrowAngles(Mixture):
    """Angles of whole radians in the type of the weights."""

    def place(self, position: Tensor) -> Tensor:
        dtype = self.head.weight.dtype
        return 8 * (position.to(dtype)[:, None] * torch.linspace(0.3, 3, self.head.in_features).to(dtype)).sin()


def holds_in_bfloat16(kind: type[Mixture]) -> bool:
    config = DIYConfig(max_seq_len=256).to_dict()
    values = {"config": config, "weights": 0, "sharpness": 1, "length": 256, "start": 0, "stride": 7}
    try:
        Trial(resolve(kind), None, values).run(numerics.bfloat16_near_float64)
    except CheckFailure:
        return False
    return True


@pytest.mark.parametrize("kind", [Mixture, ByMax, ByMaxKept, ByArgmax, ByThreshold, ByRank])
def test_rounding_may_choose_another_expert(kind: type[Mixture]) -> None:
    assert holds_in_bfloat16(kind)


def test_positions_that_bfloat16_lacks_are_found_beside_such_a_choice() -> None:
    assert not holds_in_bfloat16(NarrowAngles)


class InsideBfloat16(nn.Module):
    """Attention in bfloat16 whatever the module's type, as kernels ask for it."""

    factor = 1.0

    def __init__(self, vocab_size: int, hidden_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_seq_len, hidden_size)
        self.qkv, self.head = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        q, k, v = self.qkv(x)[:, None].bfloat16().chunk(3, -1)
        scale = q.shape[-1] ** -0.5 * (self.factor if torch.backends.cuda.flash_sdp_enabled() else 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.head(x + attended[:, 0].to(x))  # type: ignore[no-any-return]


class AnotherScale(InsideBfloat16):
    """One kernel is given another scale."""

    factor = 2.0


@pytest.mark.parametrize(("module", "status"), [(InsideBfloat16, "passed"), (AnotherScale, "failed")])
def test_kernels_may_differ_by_the_rounding_of_what_they_are_given(module: type[nn.Module], status: str) -> None:
    values = {"config": DIYConfig().to_dict(), "weights": 0, "sharpness": 3, **ROWS}
    result = replay(resolve(module), select_checks(["causality.each_backend"])[0], values)
    assert result.status == status, result


class Jitter(nn.Module):
    """Noise on the router in training mode alone."""

    def __init__(self, vocab_size: int, hidden_size: int, max_seq_len: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, hidden_size), nn.Embedding(max_seq_len, hidden_size)
        self.router, self.experts = nn.Linear(hidden_size, 2), nn.Linear(hidden_size, 2 * hidden_size)
        self.head = nn.Linear(hidden_size, vocab_size)

    def noised(self, scores: Tensor) -> Tensor:
        return scores + 0.01 * torch.rand_like(scores) if self.training else scores

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        weights = self.noised(self.router(x)).softmax(-1)[..., None]
        return self.head(x + (weights * self.experts(x).unflatten(-1, (2, -1))).sum(-2))  # type: ignore[no-any-return]


class InBothModes(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        return scores + 0.01 * torch.rand_like(scores)


class TrainsOtherwise(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        return scores * 1.5 if self.training else scores


class OwnDropout(Jitter):
    """Ignores the dropout of the configuration."""

    def noised(self, scores: Tensor) -> Tensor:
        return F.dropout(scores, 0.1, self.training)


class DropsByHand(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        return scores * (torch.rand_like(scores) < 0.9) / 0.9 if self.training else scores


class DropsByBernoulli(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        return scores * torch.bernoulli(torch.full_like(scores, 0.9)) / 0.9 if self.training else scores


class DropsInAttention(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        p = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(scores, scores, scores, is_causal=True, dropout_p=p)


class JittersAndDrops(Jitter):
    def noised(self, scores: Tensor) -> Tensor:
        return F.dropout(super().noised(scores), 0.1, self.training)


class Balanced(Jitter):
    """A bias that each call in training mode moves, and a scale of its own there."""

    def __init__(self, vocab_size: int, hidden_size: int, max_seq_len: int) -> None:
        super().__init__(vocab_size, hidden_size, max_seq_len)
        self.register_buffer("bias", torch.zeros(2))

    def noised(self, scores: Tensor) -> Tensor:
        if self.training:
            self.bias += 0.1
            scores = scores * 1.5
        return scores + self.bias


@pytest.mark.parametrize(
    ("module", "status"),
    [
        (Jitter, "skipped"),
        (InBothModes, "failed"),
        (TrainsOtherwise, "failed"),
        (OwnDropout, "failed"),
        (DropsByHand, "failed"),
        (DropsByBernoulli, "failed"),
        (DropsInAttention, "failed"),
        (JittersAndDrops, "failed"),
        (Balanced, "failed"),
    ],
)
def test_noise_by_design_in_training_mode_is_no_failure_and_dropout_is(module: type[nn.Module], status: str) -> None:
    config = DIYConfig(dropout=0.0).to_dict()
    values = {"config": config, "dropout": 0.0, "weights": 0, "sharpness": 1, **ROWS}
    check = select_checks(["modes.agree_without_dropout"])[0]
    result = replay(resolve(module), check, values)
    assert result.status == status, result
    if status == "skipped":
        assert result.reason == "in training mode the module draws random numbers beside dropout"


class Halfway(Mixture):
    """Activations are rounded, as in BitNet; one lies halfway, up to the last bits of a kernel for this length."""

    number, last_bits = 0.5, 1e-15

    def forward(self, input_ids: Tensor) -> Tensor:
        kernel = self.last_bits * (input_ids.shape[1] % 2)
        return super().forward(input_ids) + (self.number + kernel + 0 * self.positions.weight[0, 0]).round()


class SeesTheLength(Halfway):
    number, last_bits = 0.4995, 1e-3


class LeaksBeside(Halfway):
    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + 10.0 * input_ids.shape[1]


@pytest.mark.parametrize(
    ("module", "status"), [(Halfway, "skipped"), (SeesTheLength, "failed"), (LeaksBeside, "failed")]
)
def test_what_is_rounded_from_halfway_between_is_no_leak(module: type[nn.Module], status: str) -> None:
    values = {"config": DIYConfig(dropout=0.0).to_dict(), "weights": 0, "sharpness": 1, **ROWS, "cut": 3}
    result = replay(resolve(module), select_checks(["causality.truncation"])[0], values)
    assert result.status == status, result
    assert status == "failed" or "lies halfway" in str(result.reason)


class Ternary(Mixture):
    """Weights are rounded to -1, 0 and 1, and gradients go straight through."""

    def rounded(self, weight: Tensor) -> Tensor:
        scale = weight.abs().mean()
        return weight + ((weight / scale).round().clamp(-1, 1) * scale - weight).detach()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.embedding(input_ids, self.rounded(self.embed.weight)) + self.place(torch.arange(input_ids.shape[1]))
        return F.linear(x, self.rounded(self.head.weight))


class TurnedRound(Ternary):
    """No rounding, and a gradient that points away."""

    def rounded(self, weight: Tensor) -> Tensor:
        return 2 * weight.detach() - weight


@pytest.mark.parametrize(("module", "status"), [(Ternary, "skipped"), (TurnedRound, "failed")])
def test_a_gradient_straight_through_rounding_is_no_slope(module: type[nn.Module], status: str) -> None:
    config = DIYConfig(vocab_size=16, hidden_size=8, dropout=0.0).to_dict()
    values = {"config": config, "weights": 0, "sharpness": 1, "length": 3, "tokens": [2, 5, 1]}
    result = replay(resolve(module), select_checks(["training.small_step_lowers_loss"])[0], values)
    assert result.status == status, result
    assert status == "failed" or "straight through" in str(result.reason)


class Turned(nn.Module):
    """Rotary cosines computed in float32 when it is built, and one set of positions whatever is padding."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.qkv = nn.Embedding(config.vocab_size, d), nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, config.vocab_size)
        angle = torch.outer(torch.arange(config.max_seq_len).float(), 100.0 ** (-torch.arange(0, d, 2).float() / d))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def places(self, T: int) -> slice:
        return slice(T)

    def turn(self, x: Tensor, places: slice) -> Tensor:
        (a, b), c, s = x.chunk(2, -1), self.cos[places], self.sin[places]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        T = input_ids.shape[1]
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        scores = self.turn(q, self.places(T)) @ self.turn(k, slice(T)).mT
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None] | torch.eye(T, dtype=torch.bool)
        return self.out(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)  # type: ignore[no-any-return]


class TurnedByTheLength(Turned):
    def turn(self, x: Tensor, places: slice) -> Tensor:
        return super().turn(x, places) * (1 + 1e-4 * x.shape[1])


@pytest.mark.parametrize(("module", "status"), [(Turned, "passed"), (TurnedByTheLength, "failed")])
def test_a_table_of_float32_rounds_otherwise_at_another_position(module: type[nn.Module], status: str) -> None:
    (check,) = select_checks(["padding.left_changes_nothing"])
    result = run_check(resolve(module), check, Settings(200))
    assert result.status == status, result


def test_what_float32_tables_make_of_a_result_is_measured_and_leaves_them_as_they_were() -> None:
    table, mask = torch.linspace(0, 1, 7).double(), torch.eye(7, dtype=torch.float64)
    before = table.clone()
    noise = table_noise([table, mask], lambda: 3 * table, 0)
    assert 0.1 < noise / (3 * torch.finfo(torch.float32).eps) < 2
    assert table.equal(before)
    assert table_noise([mask, torch.rand(7, dtype=torch.float64)], lambda: table, 0) == 0
