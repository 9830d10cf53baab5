"""What generation leaves behind: nothing. Module, modes, prompts and torch's random state are as they were."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from diymodel.verify.adapters import LM
from diymodel.verify.checks.generation import draw_number, draw_prompt, must_be_likeliest
from diymodel.verify.failure import CheckFailure, NotApplicable, said
from diymodel.verify.forward_calls import forward_calls
from diymodel.verify.learning import accumulated, same_gradients, trainable
from diymodel.verify.registry import check
from diymodel.verify.trial import Trial


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name or "the module itself": part.training for name, part in module.named_modules()}


def _must_be_kept(lm: LM, before: dict[str, bool]) -> None:
    for name, training in _modes(lm.module).items():
        if training is not before[name]:
            modes = {True: "training", False: "eval"}
            raise CheckFailure(
                f"generate must leave every part in its mode: {name} was in {modes[before[name]]} mode, "
                f"saw it in {modes[training]} mode afterwards"
            )


@check(
    "generation.restores_mode",
    title="generate leaves the module in the mode it was in",
    step="3.3",
    needs=("generate",),
    causes=("mode-not-restored",),
)
def restores_mode(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    training = trial.draw("training", st.booleans())
    lm.module.train(training)
    before = _modes(lm.module)
    try:
        lm.generate(ids, 1)
    except Exception as error:  # a stranger's generate may raise anything
        if not training:
            raise
        lm.module.eval()
        lm.generate(ids, 1)  # which raises by itself where the mode is not at fault
        raise NotApplicable(f"generate refuses training mode: {said(error)}") from error
    _must_be_kept(lm, before)


@check(
    "generation.ignores_training_mode",
    title="generate works in eval mode whatever mode each part is in, and leaves each in its own",
    step="3.3",
    needs=("greedy", "generate_eval"),
    causes=("mode-not-restored", "mode-flag-copied"),
)
def ignores_training_mode(trial: Trial) -> None:
    lm = trial.model(dropout=0.5)
    ids = draw_prompt(trial, lm)
    new_tokens = draw_number(trial, lm, ids)
    training = trial.draw("training_parts", st.integers(1, 255))  # as bits, over and over
    for index, part in enumerate(lm.module.modules()):
        part.training = bool(training >> index % 8 & 1)
    before = _modes(lm.module)
    found = lm.greedy(ids, new_tokens)
    _must_be_kept(lm, before)
    lm.module.eval()
    what = "generation from training mode must take the likeliest token of eval mode"
    must_be_likeliest(trial, lm, ids, found[:, ids.shape[1] :], what)


@check(
    "generation.inputs_unchanged",
    title="generate does not write to the prompt",
    step="3.1",
    needs=("generate",),
    causes=("inputs-written-in-place",),
)
def inputs_unchanged(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    before = ids.clone()
    lm.generate(ids, draw_number(trial, lm, ids))
    if not torch.equal(ids, before):
        raise CheckFailure(f"the prompt must stay {before.tolist()}, saw {ids.tolist()} after generation")


@check(
    "generation.leaves_nothing",
    title="after generation, a call gives what it gave before: logits of more rows, and their gradients",
    step="3.3",
    needs=("generate",),
    causes=("state-survives-calls",),
)
def leaves_nothing(trial: Trial) -> None:
    lm = trial.model(max_sharpness=1)
    ids = trial.tokens(lm, 2, rows=1 if lm.convention.one_row else trial.draw("batch", st.integers(1, 3)))
    longest = min(ids.shape[1], lm.config.max_seq_len - 1)  # with room for a new token
    prompt = ids[:1, : trial.draw("prompt", st.integers(lm.convention.shortest, longest))]
    new_tokens = draw_number(trial, lm, prompt)
    other, lm = lm.twin(), lm.called(installed=None)  # which would take off what generate leaves installed
    lm.generate(prompt, new_tokens)
    lm.module.eval()  # its mode is another check's matter
    learns = trial.missing("graph") is None
    what = f"after {new_tokens} tokens were generated from {prompt.tolist()}, a call must give what it gives before"
    try:
        with torch.set_grad_enabled(learns):
            logits = lm.logits(ids)
        if learns:
            logits.logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a stranger's module may raise anything
        other.logits(ids)  # which raises by itself where generation is not at fault
        raise CheckFailure(f"{what}, saw {said(error)}") from error
    trial.same(logits, other.logits(ids), what, other, lambda: other.logits(ids))
    if learns:
        found = accumulated(trainable(lm))
        same_gradients(trial, found, f"{what}, the gradient too", other, lambda: other.logits(ids).logsumexp(-1).sum())


@check(
    "generation.random_state_untouched",
    title="greedy generation, and sampling with a seed of its own, leave torch's random state alone",
    step="3.1",
    needs=("generate",),
    causes=("global-random-state-changed",),
)
def random_state_untouched(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    generating = lm.generating
    ways = []
    if not trial.subject.missing("greedy") and "top_k" not in generating.greedy:  # top_k=1 is sampling, of one token
        ways.append("greedy")
    if not trial.subject.missing("sampling") and "seed" in generating.names:
        ways.append("seeded")
    if not ways:
        raise NotApplicable("generate samples from torch's own random state whatever it is told")
    how = trial.draw("how", st.sampled_from(ways))
    before = _random_state()
    if how == "greedy":
        lm.greedy(ids, 2)
    else:
        lm.sample(ids, 2, trial.draw("seed", st.integers(0, 2**16)))
    drawn = how == "greedy" and "temperature" in generating.greedy  # by chance that leaves no choice
    if not torch.equal(_random_state(), before) and not (drawn and _goes_on_from_before(lm, ids)):
        raise CheckFailure(f"{how} generation must leave torch's global random state as it was, saw it changed")


def _goes_on_from_before(lm: LM, ids: torch.Tensor) -> bool:
    """Whether the random state after a greedy generation follows from the one before: it drew, and set no seed."""
    after = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        lm.greedy(ids, 2)
        after.append(_random_state())
    return torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])


def _random_state() -> torch.Tensor:
    """Of the global generators, on the CPU and on the current GPU."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)


@check(
    "generation.overlong_refused",
    title="generate refuses more tokens than max_seq_len, prompt and new ones together, before the first",
    step="4.1",
    needs=("generate", "strict_generation"),
    causes=("generation-overflow", "position-table-clamped"),
)
def overlong_refused(trial: Trial) -> None:
    lm = trial.model()
    ids = draw_prompt(trial, lm)
    longest = lm.config.max_seq_len
    # One token more would do for a module that never feeds the last one.
    new_tokens = longest - ids.shape[1] + trial.draw("too_many", st.integers(2, 4))
    calls: list[Any] = []
    what = f"a prompt of {ids.shape[1]} and {new_tokens} new tokens are more than max_seq_len={longest} and must be"
    with forward_calls(lm.module, calls.append):
        trial.refuses(lambda: lm.generate(ids, new_tokens), f"{what} refused")
    if calls:
        raise CheckFailure(f"{what} refused before the first token, saw {len(calls)} forward passes before the error")
