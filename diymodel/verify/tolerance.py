"""How much two results that should be equal may differ.

Semantics are judged in float64. There, rounding stays below 1e-12 of the largest logit and bugs begin above 1e-9 in
healthy modules, so 1e-11 decides nearly always. But ``.double()`` is not always float64: many modules keep float32 in
their norms or rotary tables. Where a difference is larger than 1e-11, the module's own rounding is therefore measured,
and 16 times that is allowed. In float32 the same factor holds; half types get 4 times, as a gross check.

Where two rows stand at other positions, that includes what rounding a table to float32 changes, such as rotary cosines
that a constructor made: it is another at every position, so results at the same positions do not show it.

What rounds always to the same number measures as nothing: a saturated softmax in float32 gives exactly 1 and is off by
what it left out. A module that computes in float32 inside may therefore be off by float32's own step, whatever was
measured. One that does so on one of two paths alone, which the other's rounding does not show, may be off by what is
allowed in float32, or by what weights that are off by its rounding change. Kernels of attention that are given a half
type inside may be off by what is allowed in that type; nothing else may, for that would hide bugs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diymodel._compat import DispatchMode
from diymodel.verify.failure import NotApplicable
from diymodel.verify.randomness import reseed, seeded

HEALTHY_TRIALS, FALSE_ALARMS = 1_000_000, 0  # of correct models, as measured: benchmarks/results/false_alarms.json
BEYOND_ROUNDING = 1e-3  # times the largest value: forty times the worst rounding ever measured in a float64 module
_HALF = {torch.float16, torch.bfloat16}
_STEPS = {torch.float64: 2.0**-20, torch.float32: 2.0**-16}
_BINOMIAL = (1.0, -4.0, 6.0, -4.0, 1.0)  # of a fourth difference; on noise of size n it has size n · √70
_GAIN = 70**0.5


def rounding(dtype: torch.dtype) -> float:
    """The share of the largest value that needs no measuring: in float64 more than rounding, less than any bug."""
    return 1e-11 if dtype == torch.float64 else noise_factor(dtype) * torch.finfo(dtype).eps


def noise_factor(dtype: torch.dtype) -> int:
    """How many times the measured rounding is allowed."""
    return 16 if dtype in (torch.float64, torch.float32) else 4


class Dtypes(DispatchMode):
    """Notes the types that operations inside give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add(result.dtype)  # at the latest what casts
        return result


def _dtypes_in(run: Callable[[], Tensor]) -> set[torch.dtype]:
    dtypes = Dtypes()
    with torch.no_grad(), seeded(), dtypes:
        run()
    return dtypes.seen


def float32_step(run: Callable[[], Tensor]) -> float:
    """What one rounding to float32 can change, as a share of the largest value; 0 where ``run()`` computes in none."""
    return torch.finfo(torch.float32).eps if torch.float32 in _dtypes_in(run) else 0.0


def half_step(run: Callable[[], Tensor]) -> float:
    """What is allowed in the half type that ``run()`` computes in, as a share of the largest value; 0 for none."""
    return max((rounding(dtype) for dtype in _dtypes_in(run) & _HALF), default=0.0)


def estimate_noise(module: nn.Module, run: Callable[[], Tensor], seed: int, enough: float = math.inf) -> float:
    """The rounding error in ``run()``, as an absolute size.

    Along a random direction in weight space the exact result is smooth, so its fourth differences at tiny steps vanish
    and what is left is rounding (ECnoise, Moré and Wild 2011). The larger of two directions counts; the second is left
    out where the first gives ``enough``. The weights are left as they were.
    """
    with torch.no_grad(), seeded():
        noise = _fourth_difference(module, run, 2 * seed)
        return noise if noise >= enough else max(noise, _fourth_difference(module, run, 2 * seed + 1))


def _fourth_difference(module: nn.Module, run: Callable[[], Tensor], seed: int) -> float:
    parameters = list(module.parameters())
    directions = [
        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + i)).to(parameter)
        for i, parameter in enumerate(parameters)
    ]
    h = _STEPS.get(parameters[0].dtype, 2.0**-5)
    results = []
    with _restored(parameters) as originals:
        for t in range(7):
            for parameter, original, direction in zip(parameters, originals, directions, strict=True):
                parameter.copy_(original * (1 + t * h * direction))
            reseed()  # dropout left on is no rounding
            results.append(run().double())
    differences = [
        sum(weight * results[start + i] for i, weight in enumerate(_BINOMIAL)) for start in range(len(results) - 4)
    ]
    return max(float(torch.as_tensor(difference).abs().max()) for difference in differences) / _GAIN


@torch.no_grad()
def off_weights(module: nn.Module, run: Callable[[], Tensor], size: float) -> float:
    """How far ``run()`` moves when every weight is off by a share of about ``size``, as an absolute size.

    That is what roundings of that size on the way can change, amplified as they would be. The weights are left as they
    were.
    """
    parameters = list(module.parameters())
    before = run().double()
    moves = []
    with _restored(parameters) as originals:
        for seed in range(2):
            for index, (parameter, original) in enumerate(zip(parameters, originals, strict=True)):
                generator = torch.Generator().manual_seed(1000 * seed + index)
                parameter.copy_(original * (1 + size * torch.randn(original.shape, generator=generator).to(original)))
            moves.append(float((run().double() - before).abs().max()))
    return max(moves)


def table_noise(tensors: Iterable[Tensor], run: Callable[[], Tensor], seed: int) -> float:
    """How far ``run()`` moves when tables that were computed in float32 are off by its rounding, as an absolute size.

    Such a table in float64 holds numbers of float32 alone, like rotary cosines of a constructor. Rounding is another at
    every position, so that what is equal but for its position is so up to this. What bfloat16 holds as well, such as a
    mask or a scale, is exact in every type. The tables are left as they were.
    """
    tables = [x for x in tensors if x.dtype in (torch.float64, torch.complex128) and _is_of_float32(x.detach())]
    if not tables:
        return 0.0
    generator = torch.Generator().manual_seed(seed)
    half = torch.finfo(torch.float32).eps / 2
    with torch.no_grad(), seeded():
        before = run().double()
        with _restored(tables) as originals:
            for table, original in zip(tables, originals, strict=True):
                off = torch.randn(original.shape, generator=generator).to(original)
                table.copy_(original * (1 + half * off))
            reseed()
            return float((run().double() - before).abs().max())


@contextlib.contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What the tensors hold, which they hold again afterwards."""
    originals = [tensor.detach().clone() for tensor in tensors]
    try:
        yield originals
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)


def _is_of_float32(tensor: Tensor) -> bool:
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    numbers = numbers[numbers.isfinite()]
    return numbers.float().double().equal(numbers) and not numbers.bfloat16().double().equal(numbers)


def differences(seen: Tensor, expected: Tensor) -> Tensor:
    """How far two results lie apart; NaN where one alone is NaN. Where both are, or the same infinity, that is none.

    Raises:
        NotApplicable: no number is finite, so that nothing is compared.
    """
    difference = (seen - expected).abs()
    if not bool(difference.isnan().any()):
        return difference
    alike = (seen == expected) | (seen.isnan() & expected.isnan())
    if bool((alike & ~expected.isfinite()).all()):
        raise NotApplicable("there is no finite number to compare")
    return difference.masked_fill(alike, 0)


def first_wrong(wrong: Tensor, seen: Tensor, expected: Tensor) -> str:
    """Two numbers that differ, and where the first of them stand."""
    first = tuple(wrong.nonzero()[0].tolist()) if wrong.dim() else ()
    names = {3: ("row", "position", "token"), 2: ("row", "token")}.get(wrong.dim(), ("index",) * wrong.dim())
    where = ", ".join(f"{name} {index}" for name, index in zip(names, first, strict=True)) or "the value"
    return f"{float(seen[first]):.9g} instead of {float(expected[first]):.9g} first at {where}"
