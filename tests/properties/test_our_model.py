"""The properties of a causal language model, on ours: the harness is their one implementation.

What concerns our own interface alone, and no stranger's, is in ``test_<module>.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from diymodel.verify import Subject, list_checks, parametrize_with_checks
from diymodel.verify.registry import Check
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import OWN, resolve

SKIPPED = {  # checks of what our model does not have, and the reason that must be given
    **{check.id: "optional" for check in list_checks() if check.optional},  # these are run in a test of their own
    "decode.caller_object": "its cache is a value",
    "directory.cached_equals_full": "the subject is no directory with saved weights",
    "directory.complete": "the subject is no directory with saved weights",
    "gradients.checkpointing": "the module has no gradient_checkpointing_enable",
    "loss.items_in_batch": "forward has no num_items_in_batch",
    "loss.labels_change_no_logit": "forward has no labels",
    "packing.documents_do_not_meet": "forward has no document_ids",
    "padding.left_changes_nothing": r"forward\(seq_lengths=…\) says nothing of padding on the left",
    "padding.left_with_cache": r"forward\(seq_lengths=…\) says nothing of padding on the left",
    "padding.mask_is_used": r"forward\(seq_lengths=…\) can hide no token that stands before others",
    "padding.positions_are_used": "forward has no attention_mask and position_ids",
    "state.resized_vocabulary": "the module has no resize_token_embeddings",
    "training.optimizer_is_complete": "the module has no configure_optimizers",
    "window.width": "the subject has no sliding window",
}
IN_FLOAT64_ONLY = {"gradients.long_row_finite"}  # it holds float32 against that
SUBJECT = resolve(OWN)


@parametrize_with_checks([SUBJECT])
def test_our_model(lm: Subject, check: Callable[[Subject], object], request: pytest.FixtureRequest) -> None:
    reason = SKIPPED.get(request.node.callspec.id.removeprefix(f"{OWN}-"))
    if reason is not None:
        with pytest.raises(pytest.skip.Exception, match=reason):
            check(lm)
        return
    try:
        check(lm)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"it must run on our model, and was {skipped}")


@pytest.mark.usefixtures("few_trials")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("check", list_checks(), ids=lambda check: check.id)
def test_our_model_in_narrow_types(check: Check, dtype: str) -> None:
    """Roughly: semantics are judged in float64."""
    result = verify_one(SUBJECT, check, Settings.of("quick", dtype=dtype))
    assert result.status == ("skipped" if check.id in SKIPPED.keys() | IN_FLOAT64_ONLY else "passed"), result


@pytest.mark.slow
@pytest.mark.parametrize("check", [check for check in list_checks() if check.optional], ids=lambda check: check.id)
def test_our_model_on_optional_checks(check: Check) -> None:
    result = verify_one(SUBJECT, check, Settings.of("quick", optional=True))
    assert result.status == "passed", result


def test_no_check_is_skipped_that_is_gone() -> None:
    assert SKIPPED.keys() <= {check.id for check in list_checks()}
