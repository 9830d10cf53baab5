"""Settings of a model and of a training run: validated, frozen, importable without torch.

A field is declared once, with its default and its documentation; ``diymodel train --help`` is made from the same
declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self


def _field(default: Any, doc: str) -> Any:
    """A dataclass field whose documentation travels with it (``field.metadata["doc"]``)."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class _Settings:
    """What both configurations share: type checks, ``to_dict`` and ``from_dict``."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as plain JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping of field names.

        Raises:
            ValueError: a key is no field; the message names the nearest one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise ValueError(f"{cls.__name__} has no field {key!r}; the nearest is {nearest[0]!r}")
        return cls(**values)

    def _refuse(self, name: str, reason: str) -> typing.NoReturn:
        raise ValueError(f"{type(self).__name__}.{name}={getattr(self, name)!r}: {reason}")

    def _check_types(self) -> None:
        """Hold every field to its annotation; a whole number is accepted, and stored, where a float is asked for."""
        for name, allowed in self._alternatives().items():
            value = getattr(self, name)
            if float in allowed and type(value) is int:
                object.__setattr__(self, name, float(value))
            elif value not in allowed and type(value) not in allowed:
                names = " or ".join(repr(a) if isinstance(a, str) else a.__name__ for a in allowed)
                raise TypeError(f"{type(self).__name__}.{name}={value!r}: expected {names}, got {type(value).__name__}")

    @classmethod
    @functools.cache  # annotations are strings, compiled each time they are asked for
    def _alternatives(cls) -> dict[str, tuple[Any, ...]]:
        """By field, the types or the literal values that its annotation allows."""
        return {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(cls).items()}

    def _check_at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < minimum:
                self._refuse(name, f"must be at least {minimum}")

    def _check_finite_positive(self, *names: str) -> None:
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                self._refuse(name, "must be a finite number above 0")


@dataclass(frozen=True)
class DIYConfig(_Settings):
    """The architecture of a :class:`diymodel.DIYForCausalLM`.

    ``num_kv_heads`` and ``intermediate_size`` left at None are filled in on construction, so that every reader of a
    config sees numbers (``dataclasses.replace`` therefore keeps the numbers once derived).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value; the message gives field, value and reason.
    """

    vocab_size: int = _field(6400, "number of distinct tokens")
    num_layers: int = _field(2, "number of ModelBlocks")
    hidden_size: int = _field(256, "width of the residual stream; divisible by num_heads")
    num_heads: int = _field(4, "number of query heads")
    max_seq_len: int = _field(128, "longest sequence, cached positions included")
    dropout: float = _field(0.1, "probability of zeroing an activation, in training only; in [0, 1)")
    num_kv_heads: int | None = _field(None, "number of key/value heads; divides num_heads (default: num_heads)")
    intermediate_size: int | None = _field(
        None, "width inside the MLP (default: 8/3 hidden_size, up to a multiple of 8)"
    )
    rms_norm_eps: float = _field(1e-6, "added to the mean square inside RMSNorm")
    rope_theta: float = _field(10000.0, "base of the rotary wavelengths")
    tie_word_embeddings: bool = _field(False, "lm_head and embedding share one weight")
    pad_token_id: int | None = _field(None, "token that fills short rows (default: none)")

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "vocab_size", "num_layers", "hidden_size", "num_heads", "max_seq_len")
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 8 * math.ceil(self.hidden_size / 3))
        self._check_at_least(1, "num_kv_heads", "intermediate_size")
        if self.hidden_size % self.num_heads:
            self._refuse("hidden_size", f"not divisible by num_heads={self.num_heads}")
        if self.head_size % 2:
            self._refuse(
                "hidden_size",
                f"the head size hidden_size / num_heads = {self.head_size} is odd, and rotary positions turn pairs",
            )
        if self.num_heads % self.kv_heads:
            self._refuse("num_heads", f"not divisible by num_kv_heads={self.num_kv_heads}")
        if not 0 <= self.dropout < 1:
            self._refuse("dropout", "must be in [0, 1)")
        self._check_finite_positive("rms_norm_eps", "rope_theta")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            self._refuse("pad_token_id", f"must be a token id in [0, vocab_size={self.vocab_size})")

    @property
    def head_size(self) -> int:
        """Width of one attention head: ``hidden_size // num_heads``."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """``num_kv_heads`` as the int it is after construction."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def mlp_size(self) -> int:
        """``intermediate_size`` as the int it is after construction."""
        assert self.intermediate_size is not None
        return self.intermediate_size


@dataclass(frozen=True)
class TrainConfig(_Settings):
    """How a run trains; the architecture is :class:`DIYConfig`'s.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value; the message gives field, value and reason.
    """

    steps: int = _field(400, "optimizer steps")
    batch_size: int = _field(16, "sequences in a micro-batch")
    grad_accumulation: int = _field(1, "micro-batches in one optimizer step")
    learning_rate: float = _field(3e-3, "highest learning rate, reached after the warm-up")
    min_lr_ratio: float = _field(0.1, "last learning rate as a share of the highest; in [0, 1]")
    warmup_steps: int = _field(40, "steps over which the learning rate rises from 0")
    weight_decay: float = _field(0.1, "AdamW weight decay on matrices (norms are left alone)")
    beta1: float = _field(0.9, "AdamW decay of the gradient's mean; in [0, 1)")
    beta2: float = _field(0.95, "AdamW decay of the gradient's square; in [0, 1)")
    grad_clip: float = _field(1.0, "largest norm of the whole gradient")
    batching: Literal["packed", "padded"] = _field(
        "packed", "documents end to end in full windows, or one a row, padded on the right"
    )
    eval_every: int = _field(100, "steps between evaluations on held-out text")
    eval_batches: int = _field(16, "most batches in an evaluation")
    save_every: int = _field(100, "steps between checkpoints")
    log_every: int = _field(10, "steps between progress lines")
    seed: int = _field(0, "seed of the weights, the dropout and the order of the data")
    device: str = _field("auto", "cpu, cuda, mps …; auto takes the accelerator there is")
    dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "bfloat16 is autocast over float32 weights; auto takes it where the device is faster with it"
    )

    def __post_init__(self) -> None:
        self._check_types()
        positive = ("steps", "batch_size", "grad_accumulation", "eval_every", "eval_batches", "save_every", "log_every")
        self._check_at_least(1, *positive)
        self._check_at_least(0, "warmup_steps", "seed")
        if self.seed >= 2**64:
            self._refuse("seed", "must be below 2**64, torch's largest")
        self._check_finite_positive("learning_rate", "grad_clip")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            self._refuse("weight_decay", "must be a finite number, 0 or above")
        if not 0 <= self.min_lr_ratio <= 1:
            self._refuse("min_lr_ratio", "must be in [0, 1]")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                self._refuse(name, "must be in [0, 1)")
        if self.warmup_steps > self.steps:
            self._refuse("warmup_steps", f"longer than the whole run of steps={self.steps}")


class Preset(NamedTuple):
    """Settings that go together. Whatever is not named has the configuration's own default."""

    doc: str
    model: Mapping[str, Any]  # DIYConfig fields; the vocabulary is the tokenizer's
    train: Mapping[str, Any]  # TrainConfig fields


PRESETS: dict[str, Preset] = {
    "default": Preset(
        "0.8 million parameters; two minutes on two CPU cores",
        {"num_layers": 4, "hidden_size": 128, "max_seq_len": 256, "dropout": 0.0, "tie_word_embeddings": True},
        {"steps": 800, "batch_size": 8, "warmup_steps": 40, "eval_batches": 32},
    ),
    "quick": Preset(
        "0.2 million parameters; twenty seconds: does it run?",
        {"num_layers": 2, "hidden_size": 96, "max_seq_len": 128, "dropout": 0.0, "tie_word_embeddings": True},
        {"steps": 300, "batch_size": 16, "learning_rate": 4e-3, "warmup_steps": 20, "eval_batches": 32},
    ),
}

# For diymodel.overfit.overfit: a few dozen steps, a second or two.
OVERFIT = Preset(
    "the smallest proof that a model can learn",
    {"num_layers": 2, "hidden_size": 64, "max_seq_len": 32, "dropout": 0.0},
    {"steps": 300, "batch_size": 8},
)
