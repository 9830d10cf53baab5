"""Two leaks at once: no mask, and heads that are joined wrongly, so that a right mask alone is no cure."""

from __future__ import annotations

import pytest

from diymodel.verify import check_causal_lm
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

JOINED = "att.transpose(1, 2).flatten(2)"
MIXED = "att.transpose(-2, -1).reshape(rows, length, width)"  # over all places, with one head as well


@pytest.mark.parametrize(("mask", "repaired"), [(True, False), (False, None)])
def test_no_mask_is_named_where_a_mask_alone_mends_nothing(mask: bool, repaired: bool | None) -> None:
    """As in abcllm's Llama, which was taken for a mean over the sequence."""
    base = BASES["kept"]
    source = base.source
    assert source.count(JOINED) == 1
    source = source.replace(JOINED, MIXED)
    if not mask:
        no_mask = next(bug for bug in list_bugs() if (bug.slug, bug.base) == ("bidirectional-mask", "kept"))
        source = no_mask.put_into(source)
    report = check_causal_lm(base.subject(source), profile="quick", only=["causality.edit", "causality.truncation"])
    assert report.symptoms["leak.in_attention"] is not mask
    assert report.symptoms.get("repair.causal_attention") is repaired
    assert (report.diagnosis[0].bug == "bidirectional-mask") is not mask
