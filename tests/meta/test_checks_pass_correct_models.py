"""No check fails on a correct model of the zoo, whatever its convention; what it lacks is skipped with a reason.

On our own model: ``tests/properties/test_our_model.py``.
"""

from __future__ import annotations

import pytest

from diymodel.verify.registry import Check, list_checks
from diymodel.verify.runner import run_check
from diymodel.verify.settings import Settings
from diymodel.zoo.base import BASES
from tests.meta.verdicts import subject

EXAMPLES = 3
LACKS = {name: base.lacks | base.generation for name, base in BASES.items()}
LACKS = {name: lacks | {"hiding"} if "padding" in lacks else lacks for name, lacks in LACKS.items()}  # what hides it
GIVEN = {  # what most bases do without
    "reference",
    "shifted",
    "window",
    "directory",
    "packing",
    "nan_contained",
    "checkpoint",
    "small_init",
    "meta_init",
}
_OBJECTS = ("supplied", "windowed", "hub", "pretrained", "scribe")  # whose caches are filled
NOT_APPLICABLE = {
    *(
        (name, "state.tied_weights_stay_tied")  # they never share a weight
        for name in (
            *("plain", "onmodule", "fastlike", "supplied", "startpos", "resettable", "intermediates"),
            *("rolling", "headwise", "kept", "experts", "timeshift"),
        )
    ),
    *(
        (name, check)
        for name in ("fastlike", "supplied", "startpos", "saved")  # has none
        for check in ("modes.dropout_active_in_training", "modes.dropout_used")
    ),
    *((name, "generation.random_state_untouched") for name in ("nanogpt", "headwise")),  # only from torch's own state
    *(
        (name, "causality.each_backend")
        for name in (
            *("nanogpt", "hub", "startpos", "resettable", "intermediates", "learned"),
            *("parallel", "postnorm", "headwise", "scribe"),
            *("recurrent", "timeshift", "statespace"),  # without attention
        )
    ),
    *(
        (name, check)
        for name in ("recurrent", "timeshift", "statespace")  # likewise
        for check in ("causality.large_scores", "numerics.large_scores_finite")
    ),
    *((name, "decode.caller_object") for name in LACKS if name not in _OBJECTS),
    *((name, "decode.rows_reordered") for name in ("onmodule", "fastlike", "startpos", "resettable")),  # on the module
    *(
        (name, "decode.rows_reordered") for name in ("supplied", "intermediates", "pretrained")
    ),  # an object without a method for it
    *((name, "decode.unrelated_call") for name in ("fastlike", "startpos")),  # every call is on the one cache
    *((name, "padding.mask_is_used") for name in ("ragged", "experts")),  # takes lengths
}

APPLIES = {  # checks that need what few bases have, and which these are
    "loss.items_in_batch": {"hub", "switch"},
    "gradients.checkpointing": {"pretrained", "kept"},
    "state.resized_vocabulary": {"pretrained", "kept"},
    "padding.positions_are_used": {"learned", "writer", "switch", "scribe"},
    "training.optimizer_is_complete": {"nanogpt", "parallel"},
}
SLOW_ON = {"supplied"}  # where optional checks are tried
CASES = [(name, check) for name in LACKS for check in list_checks() if not check.optional or name in SLOW_ON]


@pytest.mark.parametrize(("name", "check"), CASES, ids=[f"{name}-{check.id}" for name, check in CASES])
def test_a_correct_model_passes(name: str, check: Check) -> None:
    lacks = {need: why for need in check.needs if (why := subject(name).missing(need))}
    if lacks:
        assert lacks.keys() & (LACKS[name] | GIVEN)
        assert all(lacks.values())
        return
    result = run_check(subject(name), check, Settings(EXAMPLES))
    applies = (name, check.id) not in NOT_APPLICABLE and name in APPLIES.get(check.id, LACKS)
    expected = "passed" if applies else "skipped"
    assert result.status == expected, result
    assert (" " in (result.reason or "")) == (expected == "skipped")  # in words
