"""The narrow types stay finite and near what float64 gives: a gross check, after semantics were judged in float64."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel._compat import scores_fit
from diymodel.verify.adapters import LM
from diymodel.verify.experiments.first_overflow import where_first
from diymodel.verify.experiments.kept_choices import with_choices_of
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, told_apart
from diymodel.verify.learning import gradients_of, trainable
from diymodel.verify.registry import check
from diymodel.verify.tolerance import estimate_noise
from diymodel.verify.trial import Trial

_LONG = 256  # positions, so that an angle kept in bfloat16 is off by whole radians at the end
_VOCABULARY = _LONG + 16  # more than there are positions, so that a table with as many rows is the token embedding
_SIZE: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 16}
_GROSS = 1 / 16  # of the largest logit; what is further off is held against the module's own rounding
_HALF_FACTOR = 4  # times the measured rounding; healthy modules stay below 1.3
_FAST_THETA = 10.0  # every rotary pair turns fast, so that none is right by turning too little to matter
_LARGE = 400.0  # its square overflows float16, whose largest number is 65504
_FITS = 30000.0


def _compare(trial: Trial, lm: LM, ids: Tensor, dtype: torch.dtype, what: str) -> None:
    """Hold the logits in ``dtype`` against float64 with the same weights, which are rounded to ``dtype`` first.

    Where that is too far off, once more with what float64 picks by size, such as experts.
    """
    narrow = lm.twin()
    narrow.cast(dtype)
    wide = narrow.twin()
    wide.cast(torch.float64)
    with torch.no_grad():
        try:
            seen = narrow.logits(ids)
        except SubjectError:
            raise
        except Exception as error:  # kernels and modules refuse narrow types in ways of their own
            raise NotApplicable(f"the module does not run in {dtype}: {type(error).__name__}: {error}") from error
        seen, expected = seen.detach().double(), wide.logits(ids).detach()  # even if forward records
    if not bool(expected.isfinite().all()):
        raise NotApplicable("in float64 the logits are not finite either: see shape.logits")
    if not bool(seen.isfinite().all()):
        position = int((~seen.isfinite()).nonzero()[0][1])
        where = where_first(narrow, ids)
        raise CheckFailure(f"{what} must be finite, saw a NaN or infinity at position {position}{where}")
    difference = (seen - expected).abs()
    largest, tolerance = float(difference.max()), _GROSS * float(expected.abs().max())
    if largest > tolerance:
        with torch.no_grad():
            again = with_choices_of(lambda: wide.logits(ids), lambda: narrow.logits(ids))
            difference = (again().double() - expected).abs().nan_to_num(torch.inf)
        largest = float(difference.max())
    if largest > tolerance:
        noise = estimate_noise(narrow.module, again, trial.values["weights"])
        tolerance = max(tolerance, _HALF_FACTOR * noise)
    if largest > tolerance:
        position = int((difference > tolerance).nonzero()[0][1])
        apart, explained = told_apart(largest, tolerance)
        raise CheckFailure(
            f"{what} must be those of float64 with the same weights up to rounding, which explains {explained}, "
            f"saw {apart}; first too far at position {position}{where_first(narrow, ids)}",
            largest,
            tolerance,
        )


def _row(trial: Trial, vocab_size: int, max_length: int) -> Tensor:
    """A long row (1, T) from two drawn numbers."""
    length = trial.draw("length", st.integers(1, max_length))
    start = trial.draw("start", st.integers(0, vocab_size - 1))
    stride = trial.draw("stride", st.integers(1, vocab_size - 1))
    return (start + stride * torch.arange(length, device=trial.device)[None]) % vocab_size


@check(
    "numerics.bfloat16_near_float64",
    title="bfloat16 logits are finite and near those of float64",
    step="5.2",
    causes=(
        "rope-low-precision",
        "softmax-overflow-half",
        "mask-value-too-small",
        "recurrence-grows",
        "decay-powers-overflow",
    ),
)
def bfloat16_near_float64(trial: Trial) -> None:
    lm = trial.model(_LONG, 1, num_layers=1, vocab_size=_VOCABULARY, dropout=0.0, rope_theta=_FAST_THETA, **_SIZE)
    ids = _row(trial, lm.config.vocab_size, min(_LONG, lm.config.max_seq_len))
    _compare(trial, lm, ids, torch.bfloat16, "bfloat16 logits")


@check(
    "numerics.large_activations_finite",
    title="float16 logits are right where the square of an activation overflows",
    step="5.2",
    causes=("rmsnorm-overflow-half", "softmax-overflow-half", "decay-powers-overflow"),
)
def large_activations_finite(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1, tie_word_embeddings=False, vocab_size=_VOCABULARY, dropout=0.0, **_SIZE)
    ids = _row(trial, lm.config.vocab_size, min(8, lm.config.max_seq_len))
    table = lm.embedding()
    with torch.no_grad():
        table.weight.mul_(_LARGE / table.weight.pow(2).mean().sqrt())
    if not _fits(lm, ids):
        raise NotApplicable("with large embeddings the module's own activations leave the range of float16")
    _compare(trial, lm, ids, torch.float16, "float16 logits with activations around 400")


@check(
    "numerics.zeros_finite",
    title="where the embedding of every token is zero, logits and gradients are finite",
    step="5.2",
    causes=("norm-of-zeros-nan",),
)
def zeros_finite(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm)
    tables = lm.tables()  # those of positions as well
    if not tables:
        raise NotApplicable("no nn.Embedding, no class called so and no parameter that is looked up by rows was found")
    with torch.no_grad():
        for table in tables:
            table.weight.zero_()
    logits = lm.logits(ids)
    if not bool(logits.isfinite().all()):
        position = int((~logits.isfinite()).nonzero()[0][1])
        raise CheckFailure(
            f"with embeddings of zeros the logits must be finite, saw a NaN or infinity at position {position}"
            f"{where_first(lm, ids)}"
        )
    if trial.subject.missing("graph") is not None:
        return
    for name, gradient in gradients_of(logits.logsumexp(-1).sum(), trainable(lm)).items():
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise CheckFailure(f"with embeddings of zeros the gradient must be finite, saw a NaN or infinity at {name}")


def _fits(lm: LM, ids: Tensor) -> bool:
    """Whether everything that passes between parts of the module has room in float16."""
    sizes = [0.0]

    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            with suppress(RuntimeError):  # within torch.func.vmap nothing has a value
                sizes.append(float(output.detach().abs().max()))

    hooks = [part.register_forward_hook(note) for part in lm.module.modules()]
    try:
        lm.logits(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes) < _FITS and scores_fit(lambda: lm.logits(ids), _FITS)
