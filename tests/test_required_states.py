"""Modules of (seq, batch) whose caller makes the state: there is no call without one, and training has it too."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from tests.test_adapters import verdicts

State = list[tuple[Tensor, Tensor]]
GRADIENTS = ("gradients.reach_every_parameter", "causality.gradient", "gradients.absent_tokens_zero")
CALLED = ("batch.*", "sensitivity.order_matters", "causality.through_cache", "decode.*", "modes.call_leaves_mode")


class OneStateALayer(nn.Module):
    """A list of states, which None in the place of each would begin as well, and of rows that it takes for tokens."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, d)
        self.cells = nn.ModuleList(nn.LSTM(d, d) for _ in range(config.num_layers))
        self.head = nn.Linear(d, config.vocab_size)

    def forward(self, tokens: Tensor, hidden: State) -> tuple[Tensor, State]:
        x, left = self.embed(tokens), []
        for cell, state in zip(self.cells, hidden, strict=True):
            x, state = cell(x, self.begun(state))
            left.append(state)
        return self.head(x), left

    def begun(self, state: Any) -> Any:
        return state

    def init_hidden(self, bsz: int) -> State:
        new = self.head.weight.new_zeros
        return [(new(1, bsz, cell.hidden_size), new(1, bsz, cell.hidden_size)) for cell in self.cells]


class Flattened(OneStateALayer):
    """All positions in one dimension."""

    def forward(self, tokens: Tensor, hidden: State) -> tuple[Tensor, State]:
        logits, left = super().forward(tokens, hidden)
        return logits.flatten(0, 1), left


class CarriesNothing(OneStateALayer):
    def begun(self, state: Any) -> Any:
        return None


class Inference(OneStateALayer):
    """Its state is written to in place, so nothing goes back through it."""

    def forward(self, tokens: Tensor, hidden: State) -> tuple[Tensor, State]:
        logits, left = super().forward(tokens, hidden)
        for state, new in zip(hidden, left, strict=True):
            for kept, value in zip(state, new, strict=True):
                kept.copy_(value.detach())
        return logits, left


class Segments(nn.Module):
    """As labml's Transformer-XL: its memory is of hidden states, begins as None, and its caller adds to it."""

    def __init__(self, config: DIYConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.qkv, self.head = (
            nn.Embedding(config.vocab_size, d),
            nn.Linear(d, 3 * d),
            nn.Linear(d, config.vocab_size),
        )

    def forward(self, x: Tensor, mem: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        new = self.embed(x)
        known = torch.cat((mem[0], new)) if mem else new
        q, k, v = (part.transpose(0, 1) for part in self.qkv(known).chunk(3, -1))
        S, T = len(known), len(new)
        ages = (torch.arange(S) - torch.arange(S - T, S)[:, None]).double().to(new)
        scores = (q[:, S - T :] @ k.transpose(1, 2) + ages).masked_fill(ages > 0, -torch.inf)
        return self.head(new + (scores.softmax(-1) @ v).transpose(0, 1)), [new.detach()]


@pytest.mark.parametrize("module", [OneStateALayer, Flattened])
def test_states_that_a_method_makes_are_of_rows_behind_the_tokens(module: type[nn.Module]) -> None:
    found = Subject(module).convention
    assert (found.sequence_first, found.always_cached) == (True, True)
    assert found.missing.keys().isdisjoint({"cache", "gradient", "graph"})
    statuses = verdicts(module, (*CALLED, *GRADIENTS))
    assert {status for id, status in statuses.items() if status != "skipped"} == {"passed"}
    assert [statuses[id] for id in (*GRADIENTS, "decode.cached_equals_full")] == ["passed"] * 4


def test_a_memory_that_must_be_given_may_begin_as_none() -> None:
    found = Subject(Segments).convention
    assert (found.past, found.sequence_first, found.cache_is_new_part) == ("mem", True, -3)
    statuses = verdicts(Segments, ("decode.cached_equals_full", "decode.chunks", "gradients.reach_every_parameter"))
    assert set(statuses.values()) == {"passed"}


class Memory(NamedTuple):
    states: list[Tensor]


class ToBeCompressed(Segments):
    """What comes back is of another kind than what is taken: its caller makes one of the other."""

    def forward(self, x: Tensor, mem: Memory | None) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        return super().forward(x, mem and mem.states)


def test_a_memory_that_its_caller_has_to_make_is_left_empty() -> None:
    found = Subject(ToBeCompressed).convention
    assert (found.past, found.extra, found.always_cached) == (None, {"mem": None}, False)
    assert found.missing["cache"] == "forward(mem=…) does not take what comes back"
    assert set(verdicts(ToBeCompressed, ("causality.edit", "gradients.reach_every_parameter")).values()) == {"passed"}


def test_a_state_that_is_not_gone_on_with_is_seen() -> None:
    report = check_causal_lm(CarriesNothing, profile="quick", only=("decode.cached_equals_full",))
    assert [result.status for result in report.results] == ["failed"], report.to_text()


def test_a_state_that_nothing_goes_back_through_is_for_inference() -> None:
    why = Subject(Inference).convention.missing["graph"]
    assert why == "every call is on the cache that its caller makes: it is for inference only"
