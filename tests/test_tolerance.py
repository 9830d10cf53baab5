"""What is allowed by dtype, and that the measured rounding is the module's rounding: not its slope, not its dropout."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import tolerance
from diymodel.verify.failure import CheckFailure, told_apart
from diymodel.verify.subject import resolve
from diymodel.verify.tolerance import estimate_noise, float32_step, noise_factor, rounding
from diymodel.verify.trial import Trial


class Line(nn.Module):
    """A weighted sum, with an error of known size that has no pattern."""

    def __init__(self, error: float, dtype: torch.dtype = torch.float64, size: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
        self.second = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype))
        self.error = error
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += 1
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(self.calls), dtype=torch.float64)
        exact = 3 * self.first.sum().exp().clamp(max=1e3) + self.second.square().sum()
        return exact + self.error * noise


def test_what_needs_no_measuring() -> None:
    assert rounding(torch.float64) == 1e-11
    assert rounding(torch.float32) == 16 * 2**-23
    assert rounding(torch.bfloat16) == 4 * 2**-7
    assert rounding(torch.float16) == 4 * 2**-10


def test_how_many_times_the_measured_rounding_is_allowed() -> None:
    factors = [noise_factor(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    assert factors == [16, 16, 4, 4]


@pytest.mark.parametrize("error", [1e-4, 1e-7])
def test_noise_is_measured_in_its_own_size(error: float) -> None:
    """The largest of 3000 fourth differences of normal noise is some four times its size; a slope adds nothing."""
    line = Line(error)
    noise = estimate_noise(line, line, seed=0)
    assert 2.5 * error < noise < 6 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_as_wide_as_the_dtype_shows(dtype: torch.dtype) -> None:
    """Where weights did not move, or moved to where the result bends, what is measured would not be rounding."""
    line = Line(0.0, dtype)
    seen: list[Tensor] = []

    def run() -> Tensor:
        seen.append(line.first.detach().clone())
        return line.first.sum()

    noise = estimate_noise(line, run, seed=3)
    assert not any(a.equal(b) for a, b in itertools.pairwise(seen[:7]))
    eps = torch.finfo(dtype).eps
    assert eps / 8 < noise < 100 * eps


def test_a_module_that_keeps_a_narrow_type_is_measured_in_it() -> None:
    line = Line(0.0)
    noise = estimate_noise(line, lambda: line.first.float().sum().double(), seed=0)
    assert 1e-9 < noise < 1e-5
    assert estimate_noise(line, lambda: line.first.sum(), seed=0) < 1e-14


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(torch.float64, 2.0**-20), (torch.float32, 2.0**-16), (torch.bfloat16, 2.0**-5), (torch.float16, 2.0**-5)],
)
def test_directions_follow_the_seed_and_differ_by_parameter(dtype: torch.dtype, step: float) -> None:
    def positions(seed: int) -> list[tuple[Tensor, Tensor]]:
        line, seen = Line(0.0, dtype), []
        estimate_noise(line, lambda: (seen.append((line.first.clone(), line.second.clone())), line.first)[1], seed)
        return [(first / line.first - 1, second / line.second - 1) for first, second in seen]

    here, there = positions(1), positions(2)
    assert len(here) == 14  # two directions of seven steps
    drawn = [torch.randn(32, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (2000, 2001, 3000, 3001)]
    for call, pair in enumerate(here):
        for seen, direction in zip(pair, drawn[call // 7 * 2 :], strict=False):
            expected = call % 7 * step * direction
            torch.testing.assert_close(seen, expected, atol=8 * torch.finfo(dtype).eps, rtol=0)
    assert not there[1][0].equal(here[1][0])
    assert not there[1][0].equal(here[8][0])


@pytest.mark.parametrize(("enough", "calls"), [(0.0, 7), (1e-4, 7), (1.0, 14), (math.inf, 14)])
def test_a_second_direction_is_left_out_where_the_first_is_enough(enough: float, calls: int) -> None:
    line = Line(1e-4)
    estimate_noise(line, line, 0, enough)
    assert line.calls == calls


def test_the_first_direction_is_enough_where_it_gives_just_that() -> None:
    line = Line(1e-4)
    line_of_one = tolerance._fourth_difference  # what one direction gives
    with torch.no_grad():
        first = line_of_one(line, line, 0)
    line.calls = 0
    assert estimate_noise(line, line, 0, enough=first) == first
    assert line.calls == 7


@pytest.mark.parametrize("larger", [1, 2])
def test_the_larger_of_two_directions_counts(larger: int) -> None:
    line = Line(0.0)

    def run() -> Tensor:
        exact = line()
        return (
            exact
            + (1.0 if larger == 1 else 1e-3) * (line.calls == 3)
            + (1e-3 if larger == 1 else 1.0) * (line.calls == 10)
        )

    assert estimate_noise(line, run, 0) == pytest.approx(6 / 70**0.5, rel=1e-6)


@pytest.mark.parametrize(("call", "weight"), [(1, 1), (2, 4), (3, 6), (4, 6), (5, 6), (6, 4), (7, 1)])
def test_each_difference_of_four_is_looked_at(call: int, weight: int) -> None:
    """A jump in one of seven results: what it weighs in the difference in which it weighs most."""
    line = Line(0.0)
    assert estimate_noise(line, lambda: line() + (line.calls == call) - 1.0, 0) == pytest.approx(weight / 70**0.5)


def test_a_slope_a_bend_and_a_cubic_are_no_noise() -> None:
    line = Line(0.0)
    for power in (1, 2, 3):
        start = line.calls
        noise = estimate_noise(line, lambda start=start, power=power: line() + 0.1 * (line.calls - start) ** power, 0)
        assert noise < 1e-10


def test_dropout_left_on_is_no_noise() -> None:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Dropout(0.5)).double()
    state = torch.get_rng_state()
    assert estimate_noise(module, lambda: module(torch.ones(1, 8, dtype=torch.float64)), 0) < 1e-14
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_as_they_were_even_where_the_run_fails() -> None:
    line = Line(0.0)
    before = [parameter.detach().clone() for parameter in line.parameters()]

    def fail() -> Tensor:
        raise InterruptedError

    estimate_noise(line, line, 0)
    with pytest.raises(InterruptedError):
        estimate_noise(line, lambda: line() if line.calls < 17 else fail(), 0)
    assert all(a.equal(b) for a, b in zip(line.parameters(), before, strict=True))


@pytest.mark.parametrize(("difference", "measured"), [(2e-3, False), (0.5e-3, True), (1e-12, False)])
def test_a_difference_is_measured_where_rounding_could_explain_it(difference: float, measured: bool) -> None:
    """More than a thousandth is no rounding in float64, less than 1e-11 needs no explanation.

    A failure costs one call more: whether the module rounds a number that lies halfway.
    """
    trial = Trial(resolve(None), None, {"weights": 0})
    lm = trial.build(DIYConfig(vocab_size=8, num_layers=1, hidden_size=4, num_heads=2, dropout=0.0), 0, 1)
    one, calls = torch.ones(1, dtype=torch.float64), []
    with contextlib.nullcontext() if difference < 1e-11 else pytest.raises(CheckFailure, match="must be one, saw"):
        trial.same(one + difference, one, "must be one", lm, lambda: (calls.append(1), one)[1])
    assert (len(calls) > 1) == measured


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        (lambda x: x.softmax(-1), 0.0),
        (lambda x: x.softmax(-1, dtype=torch.float32).double(), 2.0**-23),
        (lambda x: x.float().topk(1).values.double(), 2.0**-23),
        (lambda x: x * (x > 0).long(), 0.0),
        (lambda x: x * x.bfloat16().double(), 0.0),  # a step that would hide bugs
    ],
)
def test_the_step_of_float32_counts_where_something_is_computed_in_it(
    operation: Callable[[Tensor], Tensor], step: float
) -> None:
    assert float32_step(lambda: operation(torch.randn(3, 4, dtype=torch.float64))) == step


@pytest.mark.parametrize("largest", [1.0, 50.0])
@pytest.mark.parametrize(("steps", "inside", "same"), [(0.9, True, True), (1.1, True, False), (0.9, False, False)])
def test_rounding_that_is_always_the_same_is_allowed_up_to_its_step(
    steps: float, inside: bool, same: bool, largest: float
) -> None:
    """A softmax in float32 of scores far apart is 1, whatever the weights: nothing varies that could be measured."""
    trial = Trial(resolve(None), None, {"weights": 0})
    lm = trial.build(DIYConfig(vocab_size=8, num_layers=1, hidden_size=4, num_heads=2, dropout=0.0), 0, 1)
    one = torch.full((1,), largest, dtype=torch.float64)

    def rerun() -> Tensor:
        scores = torch.tensor([40.0, 0.0], dtype=torch.float64)
        return one * scores.softmax(-1, dtype=torch.float32 if inside else torch.float64)[0].double()

    with contextlib.nullcontext() if same else pytest.raises(CheckFailure, match="must be one, saw"):
        trial.same(one * (1 + steps * 2.0**-23), one, "must be one", lm, rerun)


def test_no_graph_is_recorded() -> None:
    line = Line(0.0)
    seen: list[bool] = []
    estimate_noise(line, lambda: (seen.append(line.first.sum().requires_grad), line.first)[1], 0)
    assert not any(seen)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (1.13, 0.5, ("1.13", "0.5")),
        (1.1312, 1.1309, ("1.1312", "1.1309")),
        (math.inf, 1e-11, ("inf", "1e-11")),
        (1.0, 1.0, ("1", "1")),
    ],
)
def test_a_difference_and_what_explains_less_are_told_apart(one: float, other: float, told: tuple[str, str]) -> None:
    assert told_apart(one, other) == told


def test_a_failure_shows_that_the_difference_is_the_larger() -> None:
    subject = resolve(None)
    trial = Trial(subject, None, {"weights": 0}, torch.float32)
    lm = trial.fresh(DIYConfig(vocab_size=8))
    tolerance = rounding(torch.float32)
    seen = torch.tensor([1.0, (1 + 1e-5) * tolerance])
    with pytest.raises(CheckFailure, match=r"difference is 1\.9074e-06, rounding explains 1\.9073e-06$"):
        trial.same(seen, torch.tensor([1.0, 0.0]), "they must be equal", lm, lambda: torch.tensor([1.0]))


def test_what_is_no_number_is_told_where_it_stands() -> None:
    trial = Trial(resolve(None), None, {"weights": 0})
    lm = trial.fresh(DIYConfig(vocab_size=8))
    seen = torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64)
    expected = seen.nan_to_num(1.5)
    with pytest.raises(
        CheckFailure, match=r"saw nan instead of 1\.5 first at index 1; .* inf, rounding explains 2e-11$"
    ):
        trial.same(seen, expected, "they must be equal", lm, lambda: expected)
    trial.same(seen, seen, "they must be equal", lm, lambda: seen)
