"""One trial of a check: everything drawn, by name, and the comparisons that decide it.

A value is drawn under a name and recorded, and a recorded trial replays from the names alone, in any version of
Hypothesis. Small values come first in every choice, so failures shrink to one layer, one head and two tokens. Torch's
random state is not Hypothesis's: weights follow from a drawn seed, with one Generator a tensor.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify import options
from diymodel.verify.adapters import LM, Around
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, said_where, told_apart
from diymodel.verify.held import tensors_on
from diymodel.verify.jumps import across_near_jumps
from diymodel.verify.randomness import seeded
from diymodel.verify.strategies import real_lengths
from diymodel.verify.tolerance import (
    BEYOND_ROUNDING,
    Dtypes,
    differences,
    estimate_noise,
    first_wrong,
    float32_step,
    half_step,
    noise_factor,
    off_weights,
    rounding,
    table_noise,
)

if TYPE_CHECKING:
    from diymodel.verify.subject import Subject

T = TypeVar("T")

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in options.DTYPES}
MAX_LENGTH = 8
LONGEST = 320  # positions that any trial asks for, above the usual small blocks of 64, 128 and 256
MAX_ROWS = 3
_ACROSS = 4  # times what it changes: of several numbers that lie halfway, some are decided so and some otherwise
_SEED = 1  # not that of the constructor, or a second module would be a copy of the first


def dtype_name(dtype: torch.dtype) -> str:
    """As in DTYPES."""
    return str(dtype).removeprefix("torch.")


class Trial:
    """What a check draws from and compares with.

    Args:
        subject: what is verified.
        draw: Hypothesis's draw, or None to replay ``recorded``.
        recorded: values by name.
        dtype: of the modules that are built; None: the subject's own, float64 unless it refuses that.
        device: where they are built.
        max_rows: of the tokens that are drawn.
    """

    def __init__(
        self,
        subject: Subject,
        draw: Callable[[st.SearchStrategy[Any]], Any] | None,
        recorded: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.subject = subject
        self.values: dict[str, Any] = dict(recorded or {})
        self.dtype = dtype or subject.convention.dtype
        self.device = device
        self.max_rows = max_rows
        self._draw = draw
        self.seen_difference: float | None = None  # the largest effect that a guard saw; None: no guard
        self._noise: dict[Any, float] = {}  # measured rounding, by module and place in a check
        self._float32: dict[Any, float] = {}  # what one rounding to float32 can change there, relative
        self.unknown: str | None = None  # a value that a replay lacks
        self.around: Around | None = None  # what each call of its modules happens in
        self.rounds_inside: Callable[[], bool] | None = None  # whether any of them computed in float32; None: not noted

    @classmethod
    def replaying(cls, subject: Subject, values: Mapping[str, Any], device: str = "cpu") -> Trial:
        """A trial on recorded values, in the dtype that they name, if they name one.

        Raises:
            ValueError: there is no such dtype.
        """
        dtype = values.get("dtype")
        if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
            raise ValueError(f"this replay has dtype={dtype!r}: it must be one of {', '.join(DTYPES)}")
        return cls(subject, None, values, DTYPES[dtype] if dtype else None, device)

    def run(self, check: Callable[[Trial], object]) -> None:
        """The check, on what every trial finds as torch's random state; afterwards that is as it was before.

        What rounding to float32 would explain is looked at again, with an eye on whether any call does that: a module
        may compute in float32 on one of two paths alone.

        Raises:
            NotApplicable: the logits of what was drawn are NaN, of which every other failure is the consequence.
        """
        try:
            with seeded(_SEED):
                check(self)
        except CheckFailure as failure:
            if not failure.not_finite and self._gives_nan():
                raise NotApplicable("the logits are NaN: see shape.logits") from failure
            if not failure.within_float32 or self.rounds_inside is not None or self.around is not None:
                raise
            again = Trial(self.subject, None, self.values, self.dtype, self.device, self.max_rows)
            dtypes = Dtypes()
            again.around = lambda start, length: dtypes
            again.rounds_inside = lambda: torch.float32 in dtypes.seen
            again.run(check)
            self.seen_difference = again.seen_difference

    def _gives_nan(self) -> bool:
        """Whether a plain call on the drawn tokens, with the drawn weights, does."""
        values = self.values
        if not {"config", "weights", "sharpness", "tokens"} <= values.keys():
            return False
        again = Trial(self.subject, None, values, self.dtype, self.device)
        try:
            with seeded(_SEED), torch.no_grad():
                lm = again.build(DIYConfig.from_dict(values["config"]), values["weights"], values["sharpness"])
                ids = torch.tensor(values["tokens"], device=self.device)
                return bool(lm.logits(ids if ids.dim() > 1 else ids[None]).isnan().any())  # one row may be drawn flat
        except Exception:  # what the check does with the module may go where a plain call does not
            return False

    # --- drawing -----------------------------------------------------------------------------------------------------

    def draw(self, name: str, strategy: st.SearchStrategy[T]) -> T:
        """A value, recorded under ``name``; on a replay the recorded one."""
        if self._draw is None:
            if name not in self.values:
                self.unknown = name
                raise KeyError(name)
            recorded: T = self.values[name]
            return recorded
        value: T = self._draw(strategy)
        self.values[name] = value
        return value

    def model(self, length: int = MAX_LENGTH, max_sharpness: int = 3, **fixed: Any) -> LM:
        """A module of the subject over a drawn configuration that holds ``length`` positions, in eval mode.

        Args:
            max_sharpness: 1 where the property needs a softmax that is not saturated.
            fixed: configuration fields that are not drawn, unless the subject refuses them: see :func:`_nearest`.
        """
        drawn = self.draw("config", self.subject.configs(length))
        choices = _nearest(drawn, fixed)
        if self.subject.widths:
            choices += [{**choice, **self.subject.widths} for choice in choices]
        values = {**self._first_taken(choices), **self.subject.own_sizes}
        self.values["config"] = values  # the report shows what was built
        config = DIYConfig.from_dict(values)
        seed = self.draw("weights", st.integers(0, 2**16))
        sharpness = self.draw("sharpness", st.integers(1, max_sharpness))

        def build() -> nn.Module:
            with seeded():
                return self.build(config, seed, sharpness).module

        # Most trials that shrink a failure run out of draws before they call anything. A new configuration is built at
        # once all the same, so that a refusal, or a constructor's error, comes where it is drawn.
        known = config in self.subject.built
        lm = LM(build if known else build(), config, self.subject.convention)
        lm.around = self.around
        return lm

    def build(self, config: DIYConfig, seed: int, sharpness: int) -> LM:
        """The subject's module of a configuration with drawn weights, in eval mode."""
        lm = self.fresh(config)
        draw_weights(lm.module, seed, sharpness)
        return lm

    def fresh(self, config: DIYConfig) -> LM:
        """A new module with the weights its constructor gave it; a configuration that it refuses ends the trial."""
        config = replace(config, **self.subject.own_sizes)
        module = self._built(config)
        if module is None:
            if self._draw is None:
                raise NotApplicable(f"the subject refuses this configuration: {self.subject.refusal}")
            reject()
        lm = LM(module, config, self.subject.convention)
        lm.cast(self.dtype, self.device).eval()
        lm.around = self.around
        return lm

    def _first_taken(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The first of several configurations that the subject builds; where it builds none, the first of all."""
        if len(choices) == 1:
            return choices[0]

        def taken(values: Mapping[str, Any]) -> bool:
            config = DIYConfig.from_dict(values)
            return config in self.subject.built or self._built(config) is not None

        with seeded():
            return next(filter(taken, choices), choices[0])

    def _built(self, config: DIYConfig) -> nn.Module | None:
        """A new module, or None for a configuration that the subject refuses."""
        try:
            module = self.subject.made(config)
            self.subject.built.add(config)
            return module
        except NotImplementedError as error:
            self.subject.refused.add(str(config))
            self.subject.refusal = str(error) or said_where(error)
            return None

    def tokens(self, lm: LM, min_length: int = 1, max_length: int = MAX_LENGTH, rows: int | None = None) -> Tensor:
        """Token ids (B, T)."""
        B = rows or self.draw("rows", st.integers(1, self.max_rows))
        shortest = max(min_length, lm.convention.shortest)
        length = self.draw("length", st.integers(shortest, max(shortest, min(max_length, lm.config.max_seq_len))))
        token = st.integers(0, lm.config.vocab_size - 1)
        drawn = self.draw("tokens", st.lists(st.lists(token, min_size=length, max_size=length), min_size=B, max_size=B))
        return torch.tensor(drawn, device=self.device)

    def missing(self, capability: str) -> str | None:
        """Why this trial goes without a capability: the subject lacks it, or it overflows in the trial's dtype."""
        convention = self.subject.convention
        if self.dtype == convention.dtype != (wanted := convention.dtype_for((capability,))):
            return f"in {self.dtype} padded rows overflow, and not in {wanted}"
        return self.subject.missing(capability)

    @property
    def takes_chunks(self) -> bool:
        """Whether several tokens may be added to a cache at once."""
        return self.missing("chunks") is None and not self.subject.convention.chunks_crash

    def right_padding(self, ids: Tensor, shortest: int = 1) -> Tensor:
        """Which tokens of each row are real, (B, T) bool; padding stands on the right."""
        B, T = ids.shape
        lengths = self.draw("lengths", real_lengths(B, T, shortest))
        return torch.arange(T, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]

    # --- deciding ----------------------------------------------------------------------------------------------------

    def same(
        self,
        seen: Tensor,
        expected: Tensor,
        what: str,
        lm: LM,
        rerun: Callable[[], Tensor],
        scale: Tensor | None = None,
        kernels: bool = False,
        moved: bool = False,
    ) -> None:
        """Fail unless ``seen`` is ``expected`` up to the subject's own rounding.

        Args:
            what: the property, as "… must …".
            lm: the module both came from.
            rerun: computes ``expected`` again, for measuring the rounding where a difference calls for it.
            scale: what the numbers were computed from, where its size and not that of ``expected`` sets the rounding
                (a loss near 0 is a difference of large logits).
            kernels: whether other kernels computed the two, which may be given a half type inside.
            moved: whether the two stand at other positions, and read other entries of a table, such as rotary cosines.
        """
        seen, expected = seen.detach(), expected.detach()
        if seen.shape != expected.shape:
            raise CheckFailure(f"{what}, of shape {tuple(expected.shape)}, saw {tuple(seen.shape)}")
        if expected.is_complex():
            seen, expected = torch.view_as_real(seen), torch.view_as_real(expected)
        if not expected.numel():
            return
        difference = differences(seen.double(), expected.double())
        measure = (expected if scale is None else scale.detach()).abs()
        largest = float(measure.where(measure.isfinite(), 0).max())  # what is not finite is wrong, and hides nothing
        tolerance, of_float32 = rounding(self.dtype) * largest, rounding(torch.float32) * largest
        worst = float(difference.nan_to_num(torch.inf, torch.inf).max())
        if worst > tolerance and self.rounds_inside is not None and self.rounds_inside():
            with lm.aside():
                moved_by = off_weights(lm.module, rerun, torch.finfo(torch.float32).eps / 2)
            tolerance = max(tolerance, of_float32, noise_factor(self.dtype) * moved_by)
        if tolerance < worst <= BEYOND_ROUNDING * largest or (worst > tolerance and self.dtype != torch.float64):
            tolerance = max(tolerance, self._measured_rounding(lm, rerun, worst, largest))
        if kernels and tolerance < worst <= rounding(torch.bfloat16) * largest:
            with lm.aside():
                tolerance = max(tolerance, half_step(rerun) * largest)
        if moved and tolerance < worst <= BEYOND_ROUNDING * largest:
            noise = table_noise(tensors_on(lm.module), rerun, self.values.get("weights", 0))
            tolerance = max(tolerance, noise_factor(self.dtype) * noise)
        wrong = ~(difference <= tolerance)  # a NaN is wrong
        if bool(wrong.any()):
            self._decided_by_rounding(lm, rerun, worst)
            apart, explained = told_apart(worst, tolerance)
            raise CheckFailure(
                f"{what}, saw {first_wrong(wrong, seen, expected)}; "
                f"the largest difference is {apart}, rounding explains {explained}",
                worst,
                tolerance,
                within_float32=self.dtype == torch.float64 and worst <= of_float32,
            )

    def identical(self, seen: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless ``seen`` is ``expected`` bit for bit."""
        if seen.shape != expected.shape:
            raise CheckFailure(f"{what}, of shape {tuple(expected.shape)}, saw {tuple(seen.shape)}")
        difference = float(differences(seen.detach(), expected.detach()).nan_to_num(torch.inf, torch.inf).max())
        if difference != 0:
            raise CheckFailure(f"{what}, saw a difference of {difference:.3g}", difference, 0.0)

    def _measured_rounding(self, lm: LM, rerun: Callable[[], Tensor], difference: float, largest: float) -> float:
        """What the module's own rounding explains; measured once for all comparisons of a loop.

        Aside: a cache that the module keeps would go on with the keys of the weights it is measured with.
        """
        factor = noise_factor(self.dtype)
        where = (lm.module, getattr(rerun, "__code__", rerun))
        if self.dtype == torch.float64:
            if where not in self._float32:
                with lm.aside():
                    self._float32[where] = float32_step(rerun)
            if (step := largest * self._float32[where]) >= difference:
                return step
        if factor * self._noise.get(where, 0.0) < difference:
            with lm.aside():
                noise = estimate_noise(lm.module, rerun, self.values.get("weights", 0), enough=difference / factor)
            self._noise[where] = max(noise, self._noise.get(where, 0.0))
        return factor * self._noise[where]

    def _decided_by_rounding(self, lm: LM, rerun: Callable[[], Tensor], difference: float) -> None:
        """End the trial where the module rounds a number that lies between two, and the other is as far off.

        Raises:
            NotApplicable: it does.
        """
        with lm.aside():
            other = across_near_jumps(rerun)
            if other is None:
                return
            effect = float((other.double() - rerun().detach().double()).abs().max())
        if _ACROSS * effect >= difference:
            raise NotApplicable("forward rounds a number that lies halfway, and the last bit decides where it goes")

    def varies(self, seen: Tensor, other: Tensor) -> None:
        """Note how far two results are apart that a bug would confuse; where they never are, nothing is proved."""
        largest = float(other.detach().abs().max())
        effect = float((seen - other).detach().abs().max()) / largest if largest > 0 else 0.0
        self.seen_difference = max(self.seen_difference or 0.0, effect)

    def refuses(self, call: Callable[[], object], what: str) -> None:
        """Fail unless the call raises an error."""
        try:
            call()
        except SubjectError:
            raise
        except Exception:  # any error a stranger chooses is a refusal
            return
        raise CheckFailure(f"{what}, saw no error")


def _nearest(drawn: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The drawn configuration with what a check asks for, and then with what a family may have fixed for good.

    Many know no grouped queries or only one group, one base of the rotary wavelengths, or tied weights alone.
    """
    asked = {**drawn, **fixed}
    options: dict[str, Sequence[Any]] = {}
    if "num_kv_heads" in fixed:
        options["num_kv_heads"] = (asked["num_kv_heads"], asked["num_heads"], 1)
    if "rope_theta" in fixed:
        options["rope_theta"] = (asked["rope_theta"], drawn["rope_theta"])
    if fixed.get("tie_word_embeddings") is False:
        options["tie_word_embeddings"] = (False, True)
    return [{**asked, **dict(zip(options, choice, strict=True))} for choice in itertools.product(*options.values())]
