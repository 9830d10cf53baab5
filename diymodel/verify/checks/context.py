"""More tokens than max_seq_len: refused where that is promised, and told apart everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.sensitivity import WIDE, differs_for_some_weights
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal
from diymodel.verify.registry import check
from diymodel.verify.trial import LONGEST, Trial

Call = Callable[[Tensor], Tensor]  # of tokens (B, T): logits, of which the last count

_BEYOND = 3  # tokens: two that may share a position, and one that sees them
_WITHIN = (-3, -2)  # two tokens before the last


@check(
    "context.overlong_refused",
    title="more than max_seq_len tokens are refused, on a cache as well",
    step="4.1",
    needs=("strict_context",),
    causes=("position-table-clamped", "generation-overflow"),
)
def overlong_refused(trial: Trial) -> None:
    lm = trial.model()
    longest = lm.config.max_seq_len
    ids = torch.arange(longest + 1, device=trial.device)[None] % lm.config.vocab_size
    trial.refuses(
        lambda: lm.logits(ids), f"{longest + 1} tokens are more than max_seq_len={longest} and must be refused"
    )
    if trial.subject.missing("cache") is None:
        _, past = lm.extend(ids[:, :-1])
        what = f"one token more on a cache of {longest} is more than max_seq_len={longest} and must be refused"
        trial.refuses(lambda: lm.extend(ids[:, -1:], past), what)


@check(
    "context.order_beyond",
    title="tokens beyond max_seq_len are refused, or their order matters",
    step="4.1",
    causes=("position-table-clamped",),
)
def order_beyond(trial: Trial) -> None:
    if trial.device != "cpu":
        raise NotApplicable("off the CPU, an index beyond a table may take the whole process down")
    lm = trial.model(num_layers=1, **WIDE)  # a second layer tells the order apart by what each position has seen
    longest = lm.config.max_seq_len
    if longest > LONGEST:
        raise NotApplicable(f"the module holds {longest} positions, and no trial asks for more than {LONGEST}")
    start = trial.draw("start", st.integers(0, lm.config.vocab_size - 1))
    ids = (start + torch.arange(longest + _BEYOND, device=trial.device)[None]) % lm.config.vocab_size
    if not _order_matters(trial, lm, lm.logits, ids[:, :longest], *_WITHIN):
        raise NotApplicable("within max_seq_len the order of two tokens does not matter either")

    def on_a_cache(ids: Tensor) -> Tensor:
        logits, past = lm.extend(ids[:, :-_BEYOND])
        for token in ids[:, -_BEYOND:].tensor_split(_BEYOND, 1):
            logits, past = lm.extend(token, past)
        return logits

    ways: dict[str, Call] = {"": lm.logits}
    if trial.subject.missing("cache") is None and _order_matters(trial, lm, on_a_cache, ids[:, :longest], *_WITHIN):
        ways[" on a cache"] = on_a_cache
    seen = trial.subject.window or ids.shape[1]
    pairs = [(longest - 1, longest), (0, longest), (longest, longest + 1)]
    for way, call in ways.items():
        if refusal(lambda: call(ids)[:, -1]) is not None:  # noqa: B023
            continue
        for one, other in pairs:
            if ids.shape[1] - other > seen or _order_matters(trial, lm, call, ids, one, other):
                continue
            if _are_seen(trial, lm, call, ids, one, other):
                raise CheckFailure(
                    f"of {ids.shape[1]} tokens{way}, more than max_seq_len={longest}, exchanging those at positions "
                    f"{one} and {other} must change the last logits, or all be refused, saw no change with any draw "
                    "of the weights"
                )
        if not _is_seen(trial, lm, call, ids, longest) and _is_seen(
            trial, lm, call, ids[:, :longest], longest - _BEYOND
        ):
            raise CheckFailure(
                f"of {ids.shape[1]} tokens{way}, more than max_seq_len={longest}, the one at position {longest} must "
                f"change the last logits, as one so near does among {longest}, or all be refused, saw no change with "
                "any draw of the weights"
            )


def _row(lm: LM, ids: Tensor, one: int, other: int) -> Tensor:
    """The tokens, with another one at ``other`` than at ``one``."""
    ids = ids.clone()
    ids[:, other] = (ids[:, one] + 1) % lm.config.vocab_size
    return ids


def _order_matters(trial: Trial, lm: LM, call: Call, ids: Tensor, one: int, other: int) -> bool:
    """Whether exchanging two tokens changes the last logits."""
    ids = _row(lm, ids, one, other)
    exchanged = ids.clone()
    exchanged[:, [one, other]] = ids[:, [other, one]]
    return differs_for_some_weights(trial, lm, ids, exchanged, -1, call)


def _are_seen(trial: Trial, lm: LM, call: Call, ids: Tensor, *positions: int) -> bool:
    """Whether each of two tokens changes the last logits."""
    ids = _row(lm, ids, *positions)
    return all(_is_seen(trial, lm, call, ids, position) for position in positions)


def _is_seen(trial: Trial, lm: LM, call: Call, ids: Tensor, position: int) -> bool:
    """Whether a token changes the last logits."""
    changed = ids.clone()
    changed[:, position] = (ids[:, position] + 2) % lm.config.vocab_size
    return differs_for_some_weights(trial, lm, ids, changed, -1, call)
