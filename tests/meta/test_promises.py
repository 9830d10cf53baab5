"""What a model does not promise is skipped, with a reason that says what is missing; what is broken anyway fails."""

from __future__ import annotations

from diymodel.verify.report import Result
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject
from diymodel.zoo.base import BASES, load
from tests.meta.verdicts import CHECKS, EXAMPLES

WINDOWED = BASES["windowed"].source
COPIED = """import copy
        own, cache = cache, copy.deepcopy(cache)
        """


def verdict(on_entry: str, check_id: str) -> Result:
    """Of a check on the windowed model, which promises nothing here, with more lines at the start of its forward."""
    source = WINDOWED.replace("start = offset if", f"{on_entry}start = offset if")
    subject = Subject(load(source, "windowed").Windowed)
    return verify_one(subject, CHECKS[check_id], Settings(EXAMPLES))


def test_a_cache_object_that_is_left_alone_need_not_be_filled() -> None:
    result = verdict(COPIED, "decode.caller_object")
    assert result.status == "skipped"
    assert result.reason == "forward leaves the cache object it is given alone, and hands back another"


def test_a_cache_object_that_is_half_filled_fails() -> None:
    counted = "if own is not None: own.seen += input_ids.shape[1]\n        "
    assert verdict(COPIED + counted, "decode.caller_object").status == "failed"


def test_a_window_that_is_not_declared_is_no_failure() -> None:
    assert verdict("", "sensitivity.sees_itself_and_its_past").status == "passed"
