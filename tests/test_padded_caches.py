"""Padding in a cache, where forward takes it on one side alone, as x-transformers of 2024."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diymodel.verify import Subject
from diymodel.verify.registry import select_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.zoo.bases.intermediates import WithIntermediates
from tests.test_adapters import verdicts

PADDED = ("padding.left_with_cache", "padding.content_irrelevant_with_cache", "padding.right_changes_nothing")


class NoMaskOnItsCache(WithIntermediates):
    def forward(
        self,
        x: Tensor,
        return_intermediates: bool = False,
        mask: Tensor | None = None,
        seq_start_pos: Tensor | None = None,
        cache: Any = None,
        cache_age: int = 1,
    ) -> Any:
        if cache is not None and mask is not None:
            raise ValueError("no mask beside a cache")
        return super().forward(x, return_intermediates, mask, self.start(seq_start_pos, cache), cache, cache_age)

    def start(self, seq_start_pos: Tensor | None, cache: Any) -> Tensor | None:
        return seq_start_pos


class ForgetsWhereRowsStart(NoMaskOnItsCache):
    def start(self, seq_start_pos: Tensor | None, cache: Any) -> Tensor | None:
        return seq_start_pos if cache is None else None


def test_a_mask_that_a_cached_call_refuses_is_a_lack() -> None:
    subject = Subject(NoMaskOnItsCache)
    why = "padding on the right is refused by a call on the cache: ValueError: no mask beside a cache"
    assert subject.missing("right_padded_cache") == why
    assert verdicts(subject, PADDED) == dict.fromkeys(PADDED, "passed")
    assert Subject(WithIntermediates).missing("right_padded_cache") is None


def test_what_is_padded_on_the_left_is_checked_all_the_same() -> None:
    (check,) = select_checks(PADDED[:1])
    assert verify_one(Subject(ForgetsWhereRowsStart), check, Settings(20, shrink=False)).status == "failed"


class StartsAlone(WithIntermediates):
    """As lucidrains' speculative-decoding: no mask, only where each row begins."""

    def forward(self, x: Tensor, seq_start_pos: Tensor | None = None) -> Any:  # type: ignore[override]
        return super().forward(x, False, None, self.start(seq_start_pos), None, 1)

    def start(self, seq_start_pos: Tensor | None) -> Tensor | None:
        return seq_start_pos


class NeverTold(StartsAlone):
    """It is taken, and no layer hears of it."""

    def start(self, seq_start_pos: Tensor | None) -> Tensor | None:
        return None


def test_where_rows_begin_hides_what_stands_before() -> None:
    (check,) = select_checks(["padding.mask_is_used"])
    assert verify_one(Subject(StartsAlone), check, Settings(20)).status == "passed"
    result = verify_one(Subject(NeverTold), check, Settings(20))
    assert result.failure is not None
    assert "hiding the token at position 0 of " in result.failure.message
    assert " by seq_start_pos must change" in result.failure.message
