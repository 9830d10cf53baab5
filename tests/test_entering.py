"""A method beside ``forward`` makes the calls on a cache, which another sets up on the module."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import verdicts
from tests.test_conventions import Past

DECODE = ("decode.cached_equals_full", "decode.chunks", "decode.session", "decode.long_row")


class Trained(Past):
    """As GRPO-Zero's Qwen2: forward is for training, and inference gives the last logits alone."""

    kept: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        return self.step(tokens, None)[0]

    def init_kv_cache(self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype) -> None:
        self.kept = None

    def inference(self, tokens: Tensor, start_pos: int) -> Tensor:
        logits, self.kept, _ = self.step(tokens, self.before(start_pos))
        return logits[:, -1:]

    def before(self, start_pos: int) -> Tensor | None:
        return None if self.kept is None or not start_pos else self.kept[:, :, :start_pos]


class TellsPositions(Trained):
    """All logits, by another name, and with a setting that it needs no more."""

    inference: Any = None

    def infer_with_cache(self, x: Tensor, cur_pos: int, chunked: bool = False) -> Tensor:
        logits, self.kept, _ = self.step(x, self.before(cur_pos))
        return logits


class Warns(Trained):
    """A property is no method, and is not asked."""

    @property
    def old_name(self) -> bool:
        warnings.warn("is deprecated", FutureWarning, stacklevel=1)
        return True


class LosesTheLast(Trained):
    def before(self, start_pos: int) -> Tensor | None:
        return super().before(max(start_pos - 1, 0))


class Unrelated(Trained):
    """Counts, and goes on with nothing."""

    def inference(self, tokens: Tensor, start_pos: int) -> Tensor:
        return self.step(tokens, None)[0]


class WantsMore(Trained):
    def inference(self, tokens: Tensor, start_pos: int, table: Tensor) -> Tensor:  # type: ignore[override]
        return super().inference(tokens, start_pos) + table


@pytest.mark.parametrize(
    ("module", "called"),
    [
        (Trained, "inference(tokens, start_pos)"),
        (Warns, "inference(tokens, start_pos)"),
        (TellsPositions, "infer_with_cache(x, cur_pos)"),
    ],
)
def test_a_method_goes_on_with_what_another_sets_up(module: type[Past], called: str) -> None:
    subject = Subject(module)
    assert f"the cache is on the module, and calls on it are {called}" in subject.convention.describe()
    assert subject.missing("padded_cache") == f"{called} takes no mask"
    assert verdicts(subject, DECODE) == dict.fromkeys(DECODE, "passed")


def test_what_is_wrong_in_that_method_is_seen() -> None:
    report = check_causal_lm(LosesTheLast, profile="quick", only=DECODE[:1])
    assert [result.status for result in report.results] == ["failed"]


@pytest.mark.parametrize("module", [Unrelated, WantsMore])
def test_what_goes_on_with_nothing_or_asks_for_more_is_no_cache(module: type[Past]) -> None:
    subject = Subject(module)
    assert subject.convention.cached_entry is None
    assert subject.missing("cache") is not None
