"""What a check computes again to measure its rounding is what it compares: else it would allow too much, or too little.

A healthy module in float64 needs no measuring, so nothing else runs that code often.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.randomness import seeded
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import run_check
from diymodel.verify.settings import Settings
from diymodel.verify.subject import OWN
from diymodel.verify.trial import Trial
from tests.meta.verdicts import CHECKS, subject

ON = {  # what our model is not made for
    "decode.caller_object": "supplied",
    "gradients.checkpointing": "kept",
    "loss.items_in_batch": "hub",
    "loss.labels_change_no_logit": "hub",
    "packing.documents_do_not_meet": "packed",
    "padding.left_changes_nothing": "hub",
    "padding.left_with_cache": "hub",
    "padding.mask_is_used": "hub",
    "padding.positions_are_used": "writer",
    "state.resized_vocabulary": "kept",
    "training.optimizer_is_complete": "nanogpt",
    "window.width": "windowed",
}
COMPARED = [check.id for check in list_checks() if not check.optional]


def holds(again: Tensor, expected: Tensor) -> bool:
    """Whether each value of ``expected`` is in ``again``, up to rounding."""
    values = torch.cat((again.detach().double().flatten().sort().values, torch.tensor([torch.inf])))
    wanted = expected.detach().double().flatten()
    right = torch.searchsorted(values, wanted).clamp(max=len(values) - 1)
    nearest = torch.minimum((values[right] - wanted).abs(), (values[(right - 1).clamp(min=0)] - wanted).abs())
    return bool((nearest <= 1e-9 * max(1.0, float(wanted.abs().max()))).all())


@pytest.mark.parametrize("check_id", COMPARED)
def test_the_rounding_of_what_is_compared_is_measured(check_id: str) -> None:
    same = Trial.same

    def spied(
        trial: Trial,
        seen: Tensor,
        expected: Tensor,
        what: str,
        lm: LM,
        rerun: Callable[[], Tensor],
        scale: Tensor | None = None,
        **kinds: bool,
    ) -> None:
        same(trial, seen, expected, what, lm, rerun, scale, **kinds)
        with torch.no_grad(), seeded():
            assert holds(rerun(), expected), what
        assert any(parameter.numel() for parameter in lm.module.parameters())
        assert scale is not None or expected.dim() or not check_id.startswith("loss."), (
            "a loss near 0 is a difference of large logits"
        )

    with mock.patch.object(Trial, "same", spied):
        result = run_check(subject(ON.get(check_id, OWN)), CHECKS[check_id], Settings(2))
    assert result.status == "passed" or check_id.startswith("directory."), result
