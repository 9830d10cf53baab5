"""Positions that are taken are used, where rows that are padded on the left need them."""

from __future__ import annotations

import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal
from diymodel.verify.learning import distinct_tokens
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_MATTERS = 1e-6  # of the largest logit: what a mask of ones changes by more


@check(
    "padding.positions_are_used",
    title="positions that the caller hands over matter, or a row padded on the left needs none",
    step="5.1",
    needs=("padding", "causal"),
    causes=("position-ids-ignored", "padded-batch-shared-position"),
)
def positions_are_used(trial: Trial) -> None:
    lm = trial.model()
    convention = lm.convention
    if not (convention.mask and convention.positions) or convention.positions_are_shared or convention.always_cached:
        raise NotApplicable("forward has no attention_mask and position_ids, (batch, seq) each")
    ids = distinct_tokens(trial, lm, 3)
    near = (torch.arange(ids.shape[1], device=ids.device) // 2).expand_as(ids)  # two tokens at each position
    if (why := refusal(lm.placed, ids, near)) is not None:
        raise NotApplicable(f"positions that are not one after the other are refused: {why}")
    plain, moved = lm.logits(ids), lm.placed(ids, near)
    real = torch.ones_like(ids, dtype=torch.bool)
    if not torch.equal(moved, plain):
        if refusal(lm.placed, ids, near, real) is not None or not _alike(lm.logits(ids, real), plain):
            return  # what is wrong with the mask itself, other checks tell
        if torch.equal(lm.placed(ids, near, real), lm.logits(ids, real)):
            raise CheckFailure(
                f"beside {convention.mask} too, {convention.positions}={near[0].tolist()} must change the logits of "
                f"{ids.tolist()}, saw them as without: they are replaced by positions counted from the mask"
            )
        if trial.missing("cache") is None and not (convention.cached_entry or convention.cached_gets_all):
            _used_on_a_cache(lm, ids)
        return
    real[:, 0] = False
    if (why := refusal(lm.logits, ids, real)) is not None:
        raise NotApplicable(f"padding on the left is refused: {why}")
    alone = lm.logits(ids[:, 1:])
    what = (
        f"{convention.positions}={near[0].tolist()} changes no logit of {ids.tolist()}, so a row padded on the left "
        "must need no positions, and give what it gives alone"
    )
    trial.same(lm.logits(ids, real)[:, 1:], alone, what, lm, lambda: lm.logits(ids[:, 1:]), moved=True)


def _used_on_a_cache(lm: LM, ids: Tensor) -> None:
    """Fail where the last token's position, which matters in the whole row, changes nothing on a cache."""
    usual = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    before = usual.clone()
    before[:, -1] -= 1
    if torch.equal(lm.placed(ids, before)[:, -1], lm.placed(ids, usual)[:, -1]):
        return

    def step(positions: Tensor) -> Tensor:
        _, past = lm.extend(ids[:, :-1])
        return lm.extend(ids[:, -1:], past, positions=positions[:, -1:])[0]

    if refusal(step, before) is None and torch.equal(step(before), step(usual)):
        name, given, counted = lm.convention.positions, before[:, -1:].tolist(), usual[:, -1:].tolist()
        raise CheckFailure(
            f"on a cache too, {name}={given} must change the logits of the last of {ids.tolist()}, saw them as at "
            f"{counted}: they are replaced by positions counted from the cache"
        )


def _alike(seen: Tensor, expected: Tensor) -> bool:
    return bool((seen - expected).abs().max() <= _MATTERS * expected.abs().max())
