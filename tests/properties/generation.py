"""Generation is the plain loop "compute, choose, append", done for every row as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.properties.compare import assert_identical, assert_refused, require

Generate = Callable[..., Tensor]  # generate(model, input_ids, max_new_tokens, attention_mask=None, **settings)


def greedy_loop(model: nn.Module, input_ids: Tensor, new: int) -> Tensor:
    """The definition: the whole sequence again for each token, the likeliest one appended."""
    for _ in range(new):
        input_ids = torch.cat((input_ids, model(input_ids)[:, -1:].argmax(dim=-1)), dim=1)
    return input_ids


def greedy_equals_the_loop(generate: Generate, model: nn.Module, input_ids: Tensor, new: int, **settings: Any) -> None:
    """With settings that mean greedy, generation is the hand-written loop, with and without cache."""
    expected = greedy_loop(model, input_ids, new)
    for use_cache in (True, False):
        seen = generate(model, input_ids, new, use_cache=use_cache, **settings)
        assert_identical(seen, expected, f"tokens with use_cache={use_cache}, {settings}")


def cache_does_not_change_the_draws(
    generate: Generate, model: nn.Module, input_ids: Tensor, new: int, seed: int, **settings: Any
) -> None:
    """The same seed draws the same tokens again, with and without cache."""
    cached = generate(model, input_ids, new, seed=seed, **settings)
    for use_cache in (True, False):
        seen = generate(model, input_ids, new, seed=seed, use_cache=use_cache, **settings)
        assert_identical(seen, cached, f"tokens drawn with seed {seed}, use_cache={use_cache}, {settings}")


def seeds_draw_different_tokens(generate: Generate, model: nn.Module, input_ids: Tensor, new: int) -> None:
    """At a high temperature, of a few seeds at least two draw different tokens: it does sample."""
    drawn = {str(generate(model, input_ids, new, temperature=100.0, seed=seed).tolist()) for seed in range(8)}
    require(len(drawn) > 1, "8 seeds at temperature 100: expected different tokens, seen the same from all")


def ragged_rows_equal_rows_alone_in_generation(
    generate: Generate,
    model: nn.Module,
    input_ids: Tensor,
    lengths: Tensor,
    new: int,
    eos: int | None = None,
    padding: int = 0,
) -> None:
    """Each row of a padded batch gets what it gets alone: up to its own end-of-sequence token, then padding."""
    alone = []
    for row, length in zip(input_ids, lengths.tolist(), strict=True):
        tokens = greedy_loop(model, row[None, :length], new)[0].tolist()
        ends = [index + 1 for index in range(length, length + new) if tokens[index] == eos]
        alone.append(tokens[: ends[0]] if ends else tokens)
    # The result is as long as the longest prompt and the steps until the last row has finished.
    steps = max(len(tokens) - length for tokens, length in zip(alone, lengths.tolist(), strict=True))
    width = int(lengths.max()) + steps
    expected = torch.tensor([tokens + [padding] * (width - len(tokens)) for tokens in alone])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    for use_cache in (True, False):
        seen = generate(model, input_ids, new, mask, use_cache=use_cache, eos_token_id=eos, pad_token_id=padding)
        assert_identical(seen, expected, f"tokens of prompts of lengths {lengths.tolist()}, use_cache={use_cache}")


def wide_top_k_changes_nothing(
    generate: Generate, model: nn.Module, input_ids: Tensor, new: int, seed: int, top_k: int
) -> None:
    """A ``top_k`` of the whole vocabulary or more is legal and leaves every token in the draw."""
    expected = generate(model, input_ids, new, temperature=1.0, seed=seed)
    seen = generate(model, input_ids, new, temperature=1.0, seed=seed, top_k=top_k)
    assert_identical(seen, expected, f"tokens drawn with top_k={top_k}")


def everything_is_left_as_it_was(
    generate: Generate, model: nn.Module, input_ids: Tensor, new: int, fails: bool
) -> None:
    """Every submodule's mode, the global random state and the prompt, even when ``on_token`` raises."""
    modes = {name: module.training for name, module in model.named_modules()}
    ids, random_state = input_ids.clone(), torch.get_rng_state()

    def on_token(_tokens: Tensor) -> None:
        if fails:
            raise InterruptedError

    try:
        generate(model, input_ids, new, temperature=1.0, seed=0, on_token=on_token)
        require(not fails, "on_token raised: expected its exception to come through, seen none")
    except InterruptedError:
        pass
    changed = [name for name, module in model.named_modules() if module.training is not modes[name]]
    require(not changed, f"modes: expected all submodules as they were, seen changed: {changed}")
    assert_identical(torch.get_rng_state(), random_state, "global random state")
    assert_identical(input_ids, ids, "the prompt")


def overlong_is_refused(generate: Generate, model: nn.Module, input_ids: Tensor, new: int, mention: str) -> None:
    """More positions than the model has are refused before the first token."""
    tokens: list[Tensor] = []
    assert_refused(
        lambda: generate(model, input_ids, new, on_token=tokens.append),
        mention,
        f"{input_ids.shape[1]} tokens and {new} new ones",
    )
    require(not tokens, f"over-long generation: expected no token before the error, seen {len(tokens)}")
