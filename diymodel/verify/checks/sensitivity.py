"""Every position sees itself, its past and the order of it; where positions are relative, nothing but their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.checks.causality import edited
from diymodel.verify.drawn_weights import draw_weights
from diymodel.verify.failure import CheckFailure, NotApplicable, refusal, told_apart
from diymodel.verify.registry import check
from diymodel.verify.tolerance import off_weights, rounding
from diymodel.verify.trial import LONGEST, MAX_LENGTH, Trial

_WEIGHTS = 16  # draws, before saying that something has no effect: sparse features let many pass without one
_OFFSETS = (1, 10, 100, 1000)
_PERTURBED_FACTOR = 4  # times what perturbed weights change; healthy modules stay below 1 in float64, 3 in bfloat16
_GROSS = 1 / 16  # of the largest logit; in bfloat16, what is further off is held against perturbed weights
WIDE = {"hidden_size": 8, "num_heads": 1, "num_kv_heads": 1}  # a LayerNorm over two features only gives their order


@check(
    "sensitivity.sees_itself_and_its_past",
    title="changing the first token changes the logits at its own and at the last position",
    step="1.1",
    needs=("causal",),
    causes=("mask-hides-self", "gradient-detached"),
)
def sees_itself_and_its_past(trial: Trial) -> None:
    lm = trial.model(**WIDE)
    ids = trial.tokens(lm, min_length=3)
    other = edited(trial, lm, ids, 0)
    window = trial.subject.window
    last = min(ids.shape[1], window or ids.shape[1]) - 1
    for position in (0, min(1, last), last):
        if differs_for_some_weights(trial, lm, ids, other, position):
            continue
        if position > 1 and window is None:
            raise NotApplicable(
                f"position {position} does not see the first token: if that is a sliding window, say how wide it is, "
                "Subject(…, window=…)"
            )
        raise CheckFailure(
            f"changing the first token must change the logits at position {position}, saw no change with any of "
            f"{_WEIGHTS} draws of the weights"
        )


@check(
    "sensitivity.order_matters",
    title="exchanging two earlier tokens changes the last logit",
    step="1.1",
    causes=("no-positions",),
)
def order_matters(trial: Trial) -> None:
    lm = trial.model(num_layers=1, **WIDE)  # a second layer tells the order apart by what each position has seen
    a, b, c = trial.draw("three", st.permutations(range(lm.config.vocab_size)))[:3]
    ids = torch.tensor([[a, b, c]], device=trial.device)
    exchanged = torch.tensor([[b, a, c]], device=trial.device)
    if not differs_for_some_weights(trial, lm, ids, exchanged, 2):
        raise CheckFailure(
            f"exchanging the first two of the tokens {[a, b, c]} must change the logits of the last, saw no change "
            f"with any of {_WEIGHTS} draws of the weights"
        )


def differs_for_some_weights(
    trial: Trial,
    lm: LM,
    ids: Tensor,
    other: Tensor,
    position: int,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> bool:
    """Whether two inputs give logits at a position that are apart by more than rounding.

    One draw of the weights is not enough: attention can be so sure of one key that the others' weight is 0. ``logits``
    computes them; None: without a cache.
    """
    logits = logits or lm.logits
    for i in range(_WEIGHTS):
        draw_weights(lm.module, trial.values["weights"] + i, sharpness=1)
        before, after = logits(ids)[:, position], logits(other)[:, position]
        if float((after - before).detach().abs().max()) > rounding(trial.dtype) * float(before.detach().abs().max()):
            return True
    return False


@check(
    "sensitivity.shift_invariance",
    title="moving every position by the same offset changes no logit",
    step="1.1",
    needs=("shifted",),
    causes=("no-positions", "rope-low-precision", "rope-pairing-convention"),
)
def shift_invariance(trial: Trial) -> None:
    # Without any positions this holds as well, and sensitivity.order_matters fails. What far positions may change is
    # what changing every weight by the rounding of an angle so large would: many models compute angles in float32.
    subject = trial.subject
    offsets: Sequence[int] = _OFFSETS
    if subject.shifted is None:  # positions are handed over, and a table has no more of them than max_seq_len
        offsets = [offset for offset in _OFFSETS if offset <= LONGEST - MAX_LENGTH]
    lm = trial.model(MAX_LENGTH if subject.shifted else LONGEST, max_sharpness=1, num_layers=1, dropout=0.0)
    ids = trial.tokens(lm)
    offset = trial.draw("offset", st.sampled_from(offsets))
    if subject.shifted is None and offset + ids.shape[1] > lm.config.max_seq_len:
        raise NotApplicable(f"the module holds no more than {lm.config.max_seq_len} positions")
    moved = f"moving every position by {offset} must change no logit"
    with torch.no_grad():
        expected = lm.logits(ids)
        angles = torch.finfo(torch.float32).eps * (offset + ids.shape[1])
        _near(subject.moved(lm, ids, offset), expected, lm, ids, rounding(trial.dtype), angles, moved)
        narrow = lm.twin()
        narrow.cast(torch.bfloat16)
        if refusal(narrow.logits, ids) is not None:  # numerics.bfloat16_near_float64 tells why
            return
        seen, expected = (subject.moved(narrow, ids, start) for start in (offset, 0))
        _near(seen, expected, lm, ids, _GROSS, torch.finfo(torch.bfloat16).eps / 2, f"in bfloat16, {moved}")


def _near(seen: Tensor, expected: Tensor, lm: LM, ids: Tensor, share: float, rounded: float, what: str) -> None:
    """Hold two results equal up to a ``share`` of the largest, or to what weights changed by ``rounded`` explain."""
    difference = (seen.double() - expected.double()).abs()
    worst = float(difference.nan_to_num(torch.inf).max())
    tolerance = share * float(expected.abs().max())
    if worst > tolerance:
        twin = lm.twin()
        tolerance = max(tolerance, _PERTURBED_FACTOR * off_weights(twin.module, lambda: twin.logits(ids), rounded))
    if worst > tolerance:
        position = int((~(difference <= tolerance)).nonzero()[0][1])
        apart, explained = told_apart(worst, tolerance)
        raise CheckFailure(
            f"{what}, saw a difference of {apart} first at position {position}; rounding explains {explained}",
            worst,
            tolerance,
        )
