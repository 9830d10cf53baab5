"""What was saved in a directory: all of the model's weights and no others, and the cache is right with them."""

from __future__ import annotations

import torch

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure
from diymodel.verify.given import Opened
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_SHOWN = 4  # problems


def _opened(trial: Trial) -> Opened:
    """The saved model; the report shows its sizes, and judges in its dtype."""
    assert trial.subject.directory is not None
    opened = Opened(*trial.subject.directory())
    trial.values["config"] = vars(opened.config)
    trial.dtype = next(opened.module.to(trial.device).parameters()).dtype
    return opened


@check(
    "directory.complete",
    title="the files hold every weight that the model needs, in its shape, and no other",
    step="4.2",
    needs=("directory",),
    causes=(
        "config-field-not-saved",
        "tie-lost",
        "wrapper-prefix-keys",
        "parameters-unregistered",
        "resized-head-reinitialised",
    ),
)
def complete(trial: Trial) -> None:
    problems = _opened(trial).problems
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckFailure(
            "every weight of the model must be in the files with its shape, and nothing else, saw "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )


@check(
    "directory.cached_equals_full",
    title="with the saved weights, one token at a time on a cache gives the logits of the whole sequence",
    step="4.3",
    needs=("directory", "cache", "causal"),
    causes=(
        "position-restarts-in-decode",
        "cached-path-diverges",
        "window-ignored-in-decode",
        "cache-dtype-promoted",
    ),
)
def cached_equals_full(trial: Trial) -> None:
    opened = _opened(trial)
    lm = LM(opened.module, opened.config, trial.subject.convention)
    ids = trial.tokens(lm, min_length=2)
    with torch.no_grad():
        full = lm.logits(ids)
        logits, past = lm.extend(ids[:, :1])
        for t in range(1, ids.shape[1] + 1):
            what = f"with the saved weights, the cached step for position {t - 1} must give the uncached logits"
            trial.same(logits[:, -1], full[:, t - 1], what, lm, lambda: lm.logits(ids))
            if t < ids.shape[1]:
                logits, past = lm.extend(ids[:, t : t + 1], past)
