"""``train()`` and ``eval()`` switch dropout, at every depth, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from diymodel.verify.adapters import LM
from diymodel.verify.dropout import NEXT_TO_NONE, dropout_of
from diymodel.verify.experiments.draws import draws_beside_dropout
from diymodel.verify.failure import CheckFailure, NotApplicable, first_of, refusal
from diymodel.verify.learning import trained_call, training_undone
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial

_ODD = 0.47  # as nothing else in a module is
_CALLS = 24  # a tiny module may well drop the same few elements twice, but not in all these calls


def _training_differs(lm: LM, ids: Tensor) -> bool:
    first = trained_call(lm, ids)
    return any(not torch.equal(trained_call(lm, ids), first) for _ in range(_CALLS))


@check(
    "modes.dropout_active_in_training",
    title="with dropout above 0, two calls in training mode differ",
    step="3.3",
    causes=("dropout-never-active", "mode-flag-copied"),
)
def dropout_active_in_training(trial: Trial) -> None:
    lm = trial.model(dropout=_ODD)
    ids = trial.tokens(lm, min_length=2)
    lm.logits(ids)  # in eval mode: what a first call leaves behind must not decide for the calls to come
    lm.module.train()
    if _training_differs(lm, ids):
        return
    held = dropout_of(lm.module, chosen=_ODD)
    if held is None:
        raise NotApplicable("the module has no dropout: training changes no logit and no part holds a probability")
    raise CheckFailure(f"with {held}, calls in training mode must differ, saw {_CALLS + 1} equal ones")


@check(
    "modes.dropout_off_in_eval",
    title="in eval mode, the dropout probability changes no logit",
    step="3.3",
    causes=("dropout-active-in-eval", "mode-flag-copied", "dropout-rescaled-in-eval", "mode-not-restored"),
)
def dropout_off_in_eval(trial: Trial) -> None:
    lm = trial.model(dropout=0.5)
    ids = trial.tokens(lm)
    without = trial.fresh(replace(lm.config, dropout=0.0))
    if (why := refusal(without.module.load_state_dict, lm.module.state_dict())) is not None:
        raise NotApplicable(f"weights of a module with dropout do not load into one without: {why}")
    lm.module.train()
    trained_call(lm, ids)
    lm.module.eval()
    what = "in eval mode, a module with dropout 0.5 must give the logits of one with dropout 0 and the same weights"
    trial.same(lm.logits(ids), without.logits(ids), what, without, lambda: without.logits(ids))


@check(
    "modes.agree_without_dropout",
    title="with dropout 0, training mode and eval mode give the same logits",
    step="3.3",
    causes=(
        "training-branch-differs",
        "mask-dropped-with-dropout",
        "dropout-inverted",
        "expert-capacity-drops-tokens",
    ),
)
def agree_without_dropout(trial: Trial) -> None:
    # Some take another path where dropout is exactly 0; others keep what they should drop. Narrower random numbers than
    # those of float64 are below the tiny one now and then.
    dropout = trial.draw("dropout", st.sampled_from((0.0, NEXT_TO_NONE) if trial.dtype == torch.float64 else (0.0,)))
    lm = trial.model(dropout=dropout)
    ids = trial.tokens(lm)
    if (held := dropout_of(lm.module, above=dropout)) is not None:
        raise NotApplicable(f"the module keeps its dropout where config.dropout is {dropout:g}: {held}")
    runs: dict[str, Callable[[], Tensor]] = {"": lambda: lm.logits(ids)}
    if trial.missing("padding") is None:
        real = trial.right_padding(ids, lm.convention.shortest)
        if trial.missing("left_padding") is None:  # which nothing but a mask hides
            real = real.flip(1)
        runs[f" with padding (real: {real.int().tolist()})"] = lambda: lm.logits(ids, real)[real]
    for padded, run in runs.items():
        evaluated = run()
        lm.module.train()
        with training_undone(lm.module):
            trained = run()
        lm.module.eval()
        what = f"with dropout {dropout:g}, training mode must give the logits of eval mode on tokens{padded}"
        try:
            trial.same(trained, evaluated, what, lm, run)
        except CheckFailure:
            if draws_beside_dropout(lm, run):
                raise NotApplicable("in training mode the module draws random numbers beside dropout") from None
            raise


@check(
    "modes.followed_at_every_depth",
    title="train() and eval() reach every part, and can be called back and forth",
    step="3.3",
    causes=("mode-flag-copied", "dropout-active-in-eval", "mode-not-restored", "state-survives-calls"),
)
def followed_at_every_depth(trial: Trial) -> None:
    lm = trial.model(dropout=0.5)
    ids = trial.tokens(lm)
    first = lm.logits(ids)
    for mode in (True, False, True):
        lm.module.train(mode)
        if stuck := [
            name or "the module itself" for name, part in lm.module.named_modules() if part.training is not mode
        ]:
            raise CheckFailure(
                f"after train({mode}) every part must be in that mode, saw in the other: {first_of(stuck)}"
            )
        if mode:
            trained_call(lm, ids)
        else:
            lm.logits(ids)
    lm.module.eval()
    for _ in range(4):
        what = "after train() and eval() again, eval mode must give what it gave before"
        trial.same(lm.logits(ids), first, what, lm, lambda: lm.logits(ids))


@check(
    "modes.call_leaves_mode",
    title="a call leaves every part in the mode that it was in",
    step="3.3",
    causes=("mode-not-restored", "dropout-never-active"),
)
def call_leaves_mode(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    calls: dict[str, Callable[[], object]] = {"a call": lambda: lm.logits(ids)}
    if trial.subject.missing("loss") is None:
        calls["a call with labels"] = lambda: lm.loss(ids, ids)
    if trial.missing("padding") is None:
        real = trial.right_padding(ids, lm.convention.shortest)
        calls["a call on padded rows"] = lambda: lm.logits(ids, real)
    in_turn = [(False, calls), (True, calls)]
    if trial.subject.missing("cache") is None:  # which many modules refuse in training mode
        cached = ids if trial.subject.missing("cached_rows") is None else ids[:1]
        # The last one, since some modules that keep it then refuse a call without it.
        in_turn.append((False, {"a cached call": lambda: lm.extend(cached[:, -1:], lm.extend(cached[:, :-1])[1])}))
    for training, made in in_turn:
        lm.module.train(training)
        for name, call in made.items():
            parts = [(part, path, part.training) for path, part in lm.module.named_modules()]  # a call may put new ones
            call()
            if changed := [path or "the module itself" for part, path, was in parts if part.training is not was]:
                raise CheckFailure(
                    f"{name} must leave every part in the mode it was in, training={training}, saw in the other: "
                    f"{first_of(changed)}"
                )
