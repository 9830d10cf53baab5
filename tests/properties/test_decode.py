"""The properties of ``decode.py`` on our model, and a session that mixes all of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM
from tests.properties import decode
from tests.properties.compare import assert_same
from tests.properties.strategies import MAX_LENGTH, SEEDS, Case, batches, cases, configs, draw_weights, splits

ROOM = 4  # positions that stay free for continuing a case


@given(case=cases())
def test_one_by_one_equals_uncached(case: Case) -> None:
    decode.cached_equals_uncached(case.model(), case.input_ids, [1] * case.length)


@given(case=cases(min_length=2), data=st.data())
def test_chunks_equal_uncached(case: Case, data: st.DataObject) -> None:
    decode.cached_equals_uncached(case.model(), case.input_ids, data.draw(splits(case.length), "sizes"))


@st.composite
def feeds(draw: st.DrawFn, config: DIYConfig, num_rows: int) -> list[list[list[int]]]:
    """A ragged prompt, then steps of one token for all rows and ragged chunks, an empty row now and then."""
    token = st.integers(0, config.vocab_size - 1)
    drawn: list[list[list[int]]] = []
    for longest in draw(splits(config.max_seq_len)):
        shortest = 1 if longest == 1 else 0
        drawn.append([draw(st.lists(token, min_size=shortest, max_size=longest)) for _ in range(num_rows)])
    return drawn


@given(case=cases(min_rows=2), data=st.data())
def test_ragged_rows_equal_rows_alone(case: Case, data: st.DataObject) -> None:
    padding = data.draw(st.integers(0, case.config.vocab_size - 1), "padding")
    drawn = data.draw(feeds(case.config, case.num_rows), "feeds")
    decode.ragged_rows_equal_rows_alone(case.model(), drawn, padding)


@given(case=cases(room=2 * ROOM), data=st.data())
def test_branches_are_independent(case: Case, data: st.DataObject) -> None:
    first, second = (
        data.draw(batches(case.config, case.num_rows, data.draw(st.integers(1, ROOM))), name)
        for name in ("first", "second")
    )
    decode.branches_are_independent(case.model(), case.input_ids, first, second)


@given(case=cases(room=ROOM), data=st.data())
def test_unrelated_call_changes_nothing(case: Case, data: st.DataObject) -> None:
    rest = data.draw(batches(case.config, case.num_rows, ROOM), "rest")
    other_ids = data.draw(batches(case.config, case.num_rows, case.length), "other_ids")
    decode.unrelated_call_changes_nothing(case.model(), case.input_ids, rest, other_ids)


@given(case=cases(room=ROOM), data=st.data())
def test_chosen_rows_continue(case: Case, data: st.DataObject) -> None:
    rows = torch.tensor(data.draw(st.lists(st.integers(0, case.num_rows - 1), min_size=1, max_size=4), "rows"))
    rest = data.draw(batches(case.config, len(rows), data.draw(st.integers(1, ROOM))), "rest")
    decode.chosen_rows_continue(case.model(), case.input_ids, rows, rest)


@given(case=cases(room=ROOM), data=st.data())
def test_rollback_continues_the_prefix(case: Case, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, case.length), "keep")
    rest = data.draw(batches(case.config, case.num_rows, data.draw(st.integers(1, ROOM))), "rest")
    decode.rollback_continues_the_prefix(case.model(), case.input_ids, keep, rest)


@given(case=cases(room=1))
def test_cache_keeps_no_graph(case: Case) -> None:
    decode.cache_keeps_no_graph(case.model(), case.input_ids)


def test_appending_is_in_place() -> None:
    """Long enough that the buffer grows more than once."""
    config = DIYConfig(vocab_size=8, num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, max_seq_len=300)
    decode.appending_is_in_place(DIYForCausalLM(config).eval(), torch.arange(300)[None] % 8)


class CacheSession(RuleBasedStateMachine):
    """Any mix of prefill, append, branch, rollback and unrelated calls, each checked against an uncached call.

    ``versions`` holds every cache ever made, with the tokens it stands for: continuing an old one is a branch.
    """

    versions = Bundle("versions")

    @initialize(target=versions, config=configs(length=MAX_LENGTH), seed=SEEDS, rows=st.integers(1, 2), data=st.data())
    def prefill(self, config: DIYConfig, seed: int, rows: int, data: st.DataObject) -> tuple[Any, Tensor]:
        self.config, self.rows = config, rows
        self.model = DIYForCausalLM(config).double().eval()
        draw_weights(self.model, seed, sharpness=3)
        return self.reset(data)

    @rule(target=versions, data=st.data())
    def reset(self, data: st.DataObject) -> tuple[Any, Tensor]:
        return self.extend(None, torch.empty(self.rows, 0, dtype=torch.int64), data)

    @rule(target=versions, version=versions, data=st.data())
    def append(self, version: tuple[Any, Tensor], data: st.DataObject) -> tuple[Any, Tensor]:
        past, tokens = version
        return version if tokens.shape[1] == self.config.max_seq_len else self.extend(past, tokens, data)

    @rule(target=versions, version=versions, data=st.data())
    def roll_back(self, version: tuple[Any, Tensor], data: st.DataObject) -> tuple[Any, Tensor]:
        past, tokens = version
        keep = data.draw(st.integers(0, tokens.shape[1] - 1), "keep")
        return self.extend([(cached, keep) for cached, _ in past], tokens[:, :keep], data)

    @rule(data=st.data())
    def unrelated_call(self, data: st.DataObject) -> None:
        other_ids = data.draw(batches(self.config, 1, data.draw(st.integers(1, self.config.max_seq_len))), "other_ids")
        self.model(other_ids, use_cache=data.draw(st.booleans(), "use_cache"))

    def extend(self, past: Any, tokens: Tensor, data: st.DataObject) -> tuple[Any, Tensor]:
        """Continue a cache of ``tokens`` by some drawn ones, and compare their logits."""
        size = data.draw(st.integers(1, self.config.max_seq_len - tokens.shape[1]))
        new = data.draw(batches(self.config, self.rows, size), "new")
        logits, presents = self.model(new, past_key_values=past, use_cache=True)
        whole = torch.cat((tokens, new), dim=1)
        assert_same(logits, self.model(whole)[:, -size:], f"logits of {size} tokens after {tokens.shape[1]}")
        return presents, whole


TestCacheSession = CacheSession.TestCase
