"""A cache whose buffers are made for one row: it is checked with one, and that it holds no more is a lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel.verify import Subject
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import replay, verify_one
from diymodel.verify.settings import Settings
from tests.test_adapters import verdicts
from tests.test_conventions import Past

CHECKED = ("decode.cached_equals_full", "decode.chunks", "decode.session", "decode.reset", "modes.call_leaves_mode")


class Buffers:
    """Keys and values (2, 1, S, d), filled up to a place."""

    def __init__(self, longest: int, like: Tensor) -> None:
        self.held, self.filled = like.new_zeros(2, 1, longest, like.shape[1]), 0

    def before(self) -> Tensor | None:
        return self.held[:, :, : self.filled] if self.filled else None

    def put(self, new: Tensor) -> None:
        start, self.filled = self.filled, self.filled + new.shape[2]
        self.held[:, :, start : self.filled] = new


class Handed(Past):
    """Its caller makes it, and holds it."""

    def make_cache(self, max_len: int) -> Buffers:
        return Buffers(max_len, self.embed.weight)

    def forward(self, tokens: Tensor, cache: Buffers | None = None) -> Tensor:
        logits, _, new = self.step(tokens, None if cache is None else cache.before())
        if cache is not None:
            cache.put(new)
        return logits


class OnModule(Past):
    """It is kept, and asked for by a switch."""

    cache: Any = None

    def reset_cache(self) -> None:
        self.cache = Buffers(self.positions.num_embeddings, self.embed.weight)

    def forward(self, idx: Tensor, use_cache: bool = False) -> Tensor:
        logits, _, new = self.step(idx, self.cache.before() if use_cache else None)
        if use_cache:
            self.cache.put(new)
        return logits


class Always(Past):
    """Each call is on it, and told where it starts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("held", torch.zeros(2, 1, config.max_seq_len, config.hidden_size))

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        logits, _, new = self.step(tokens, self.held[:, :, :start_pos] if start_pos else None)
        self.held[:, :, start_pos : start_pos + tokens.shape[1]] = new
        return logits


@pytest.mark.parametrize("factory", [Handed, OnModule, Always])
def test_one_row_is_checked_and_several_are_a_lack(factory: Any) -> None:
    subject = Subject(factory)
    assert subject.convention.one_row
    assert "of one row" in subject.describe()
    assert verdicts(subject, CHECKED) == dict.fromkeys(CHECKED, "passed")
    why = "several rows in a cache are refused: RuntimeError: The expanded size of the tensor (1) must match"
    assert (subject.missing("cached_rows") or "").startswith(why)
    assert (subject.missing("rows") is None) is (factory is not Always)
    found = verdicts(subject, ("decode.rows_reordered", "batch.row_alone", "shape.logits"))
    assert found["decode.rows_reordered"] == "skipped"
    assert found["batch.row_alone"] == ("skipped" if factory is Always else "passed")


def top_left(T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril()


@pytest.mark.parametrize("factory", [Handed, OnModule, Always])
def test_its_bugs_are_seen(factory: Any) -> None:
    broken = type("Broken", (factory,), {"seen": lambda self, T, S: top_left(T, S)})
    (check,) = select_checks(["decode.cached_equals_full"])
    subject = Subject(broken)
    result = verify_one(subject, check, Settings(20, shrink=False))
    assert result.failure is not None
    assert result.failure.values["rows"] == 1
    assert replay(subject, check, result.failure.values).status == "failed"
