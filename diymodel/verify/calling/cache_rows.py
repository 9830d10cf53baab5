"""Finds a cache, of several rows or of one alone, as where its buffers are made for one.

Shapes: B batch, T query length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.cache_probing import find_cache
from diymodel.verify.calling.installing import reads_cache
from diymodel.verify.convention import Convention
from diymodel.verify.failure import refusal


def find_cache_and_rows(
    module: nn.Module,
    config: DIYConfig,
    convention: Convention,
    ids: Tensor,
    factory: Callable[..., Any] | None = None,
) -> tuple[Convention, dict[str, str]]:
    """As :func:`find_cache`; where several rows are refused, and one is not, that is a lack."""
    found, missing = find_cache(module, config, convention, ids[:1] if convention.one_row else ids, factory)
    if convention.one_row:
        why = _several_refused(module, config, found, ids)
        return found, missing if why is None else {**missing, "rows": why, "cached_rows": why}
    if "cache" not in missing:
        return found, missing
    one, lacking = find_cache(module, config, convention, ids[:1], factory)
    if "cache" in lacking or not reads_cache(LM(module, config, one), ids[:1]):
        return found, missing
    why = _several_refused(module, config, one, ids)
    return (found, missing) if why is None else (replace(one, one_row=True), lacking | {"cached_rows": why})


def _several_refused(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> str | None:
    why = refusal(LM(module, config, convention).extend, ids)
    return None if why is None else f"several rows in a cache are refused: {why}"
