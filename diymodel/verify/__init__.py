"""Properties that prove or refute that a causal language model behaves: ours, or anybody's ``nn.Module``.

Names are imported on first use, so that ``diymodel --help`` needs neither torch nor Hypothesis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diymodel.verify.convention import Convention as Convention
    from diymodel.verify.failure import SubjectError as SubjectError
    from diymodel.verify.plugin import parametrize_with_checks as parametrize_with_checks
    from diymodel.verify.registry import list_checks as list_checks
    from diymodel.verify.report import Report as Report
    from diymodel.verify.runner import check_causal_lm as check_causal_lm
    from diymodel.verify.subject import Subject as Subject

_HOME = {
    "Convention": "convention",
    "Report": "report",
    "Subject": "subject",
    "SubjectError": "failure",
    "check_causal_lm": "runner",
    "list_checks": "registry",
    "parametrize_with_checks": "plugin",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
