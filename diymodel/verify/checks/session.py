"""Sessions over caches: many calls, in an order that a loop over one sequence never takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM, Past
from diymodel.verify.registry import check
from diymodel.verify.trial import MAX_LENGTH, Trial

_LONGEST_CALL = 3  # tokens
_MAX_STEPS = 8
_MAX_BACK = 2
_MAX_ROWS = 2
_KINDS = ("append", "start", "unrelated")


@dataclass
class _Call:
    """One step, worked out."""

    ids: Tensor  # the new tokens (B, T)
    whole: Tensor  # with all that came before in their sequence (B, S)
    parent: int | None  # the step whose cache it continues; None: it starts anew
    cached: bool  # False: a forward pass without a cache, whose logits nobody asks for


def _steps(vocab_size: int, longest: int, max_rows: int) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Programs, as plain values.

    ``{"append": [3], "back": 0}`` puts the token 3 on the newest cache, or on the one ``back`` before it, as far as
    there are any; with none it starts a sequence. ``{"start": [3, 4], "rows": 2}`` starts one of two rows;
    ``{"unrelated": [3]}`` is a forward pass without a cache. Every row has its own tokens: each is one more than
    that of the row above.
    """
    tokens = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=longest)
    step = st.one_of(
        st.fixed_dictionaries({"append": tokens, "back": st.just(0)}),
        st.fixed_dictionaries({"append": tokens, "back": st.integers(1, _MAX_BACK)}),
        st.fixed_dictionaries({"start": tokens, "rows": st.integers(1, max_rows)}),
        st.fixed_dictionaries({"unrelated": tokens}),
    )
    return st.lists(step, min_size=2, max_size=_MAX_STEPS)


def _plan(steps: list[dict[str, Any]], first_rows: int, lm: LM, device: str) -> list[_Call]:
    """What each step calls; a step that would grow a sequence beyond the longest is left out."""
    one_timeline = lm.convention.one_timeline
    alone_on_cache = "uncached_again" in lm.convention.missing or (one_timeline and lm.convention.always_cached)
    plan: list[_Call] = []
    for step in steps:
        kind = next(name for name in _KINDS if name in step)
        open_calls = [i for i, call in enumerate(plan) if call.cached]
        parent = None
        if kind == "append" and open_calls:
            back = 0 if one_timeline else min(step["back"], len(open_calls) - 1)
            parent = open_calls[-1 - back]
        if kind == "unrelated" and alone_on_cache:
            continue
        rows = len(plan[parent].whole) if parent is not None else step.get("rows", first_rows)
        ids = torch.tensor([[token + row for token in step[kind]] for row in range(rows)], device=device)
        ids = ids % lm.config.vocab_size
        whole = ids if parent is None else torch.cat((plan[parent].whole, ids), 1)
        if whole.shape[1] <= MAX_LENGTH:
            plan.append(_Call(ids, whole, parent, kind != "unrelated"))
    return plan


@check(
    "decode.session",
    title="any sequence of prefills, appends, branches and unrelated calls gives the uncached logits",
    step="3.2",
    needs=("cache", "causal"),
    causes=(
        "state-survives-calls",
        "cache-mutated-in-place",
        "cache-list-mutated",
        "chunk-unmasked",
        "position-restarts-in-decode",
        "cached-keys-rotated-again",
        "cache-rows-shared",
        "carried-state-lost",
        "cached-path-diverges",
    ),
)
def session(trial: Trial) -> None:
    """A drawn program rather than Hypothesis's RuleBasedStateMachine: its steps are plain values, which a report shows
    and a replay reads, in any version of Hypothesis, and it runs within one trial, with the trial's model and limits.
    """
    lm = trial.model()
    longest = _LONGEST_CALL if trial.takes_chunks else 1
    max_rows = min(_MAX_ROWS, trial.max_rows)
    first_rows = trial.draw("rows", st.integers(1, max_rows))
    plan = _plan(trial.draw("steps", _steps(lm.config.vocab_size, longest, max_rows)), first_rows, lm, trial.device)
    expected = [lm.logits(call.whole)[:, -call.ids.shape[1] :] for call in plan]
    pasts: list[Past | None] = []
    for i, call in enumerate(plan):
        if not call.cached:
            lm.logits(call.whole)
            pasts.append(None)
            continue
        past = pasts[call.parent] if call.parent is not None else None
        if past is not None and any(later.parent == call.parent for later in plan[i + 1 :]):
            past = lm.copied(past)
        logits, present = lm.extend(call.ids, past)
        pasts.append(present)
        given = logits.shape[1]
        where = "without a cache before them" if call.parent is None else f"on the cache of step {call.parent}"
        what = f"step {i}, {call.ids.tolist()} {where}, must give the uncached logits of {call.whole.tolist()}"
        trial.same(logits, expected[i][:, -given:], what, lm, lambda ids=call.whole: lm.logits(ids))  # type: ignore[misc]


@check(
    "decode.reset",
    title="after any use of a cache, a new sequence starts as in a new module",
    step="3.2",
    needs=("cache",),
    causes=("state-survives-calls", "cache-mutated-in-place"),
)
def reset(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    used_rows = trial.draw("used_rows", st.integers(1, trial.max_rows))
    used_length = trial.draw("used_length", st.integers(1, 4))
    used = torch.arange(used_rows * used_length, device=trial.device) % lm.config.vocab_size
    used = used.view(used_rows, used_length)

    def run(part: LM) -> Tensor:
        first, past = part.extend(ids[:, :-1])
        last, _ = part.extend(ids[:, -1:], past)
        return torch.cat((first, last), 1)

    new = lm.twin()
    _, past = lm.extend(used)
    lm.extend(used[:, :1], past)
    what = f"after a cache of {used_rows} rows was used, a new sequence must give what it gives in a new module"
    trial.same(run(lm), run(new), what, lm, lambda: run(lm))
