"""A cache that a method of the module sets up there, and that later calls go on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from diymodel.verify.calling.installed import installed_by, state_of
from tests.test_adapters import verdicts
from tests.test_conventions import Past

DECODE = ("decode.cached_equals_full", "decode.chunks", "decode.unrelated_call", "decode.session", "decode.reset")


class Enabled(Past):
    """A flag says that calls go on with what is kept."""

    enabled = False
    kept: Any = None

    def enable_kv_cache(self, max_seq_len: int | None = None) -> None:
        self.enabled, self.kept = True, None

    def forward(self, idx: Tensor) -> Tensor:
        if not self.enabled:
            return self.step(idx, None)[0]
        logits, self.kept, _ = self.step(idx, self.kept)
        return logits


class Kept(nn.Module):
    """Buffers as long as the sequence may be, and how far they are filled."""

    def __init__(self, rows: int, like: Tensor, longest: int) -> None:
        super().__init__()
        self.register_buffer("held", like.new_zeros(2, rows, longest, like.shape[1]))
        self.filled = 0

    def put(self, start: int, new: Tensor) -> None:
        self.filled = start + new.shape[2]
        self.held[:, :, start : self.filled] = new


class Installed(Past):
    """A part is put where None stood."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cache: Any = None

    def install_kv_cache(self, batch_size: int, max_len: int) -> None:
        self.cache = Kept(batch_size, self.embed.weight, max_len)

    def forward(self, tokens: Tensor) -> Tensor:
        start = self.cache.filled if self.cache else 0
        logits, _, new = self.step(tokens, self.cache.held[:, :, :start] if start else None)
        if self.cache:
            self.cache.put(start, new)
        return logits


class Placed(Installed):
    """Its caller says where the tokens stand; without a cache it is as any other."""

    def init_cache(self, batch_size: int, max_len: int) -> None:
        self.install_kv_cache(batch_size, max_len)

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
        logits, _, new = self.step(tokens, self.cache.held[:, :, :start_pos] if start_pos else None)
        if self.cache:
            self.cache.put(start_pos, new)
        return logits


class PlacedAtOnce(Placed):
    """It is called after ``init_cache`` alone."""

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:  # type: ignore[override]
        self.cache.put(start_pos, self.cache.held[:, :, :0])
        return super().forward(tokens, start_pos)


class Asked(Enabled):
    """The flag is an argument, and what is to be reset must be there."""

    def init_cache(self) -> None:
        self.kept = [None]

    def reset_cache(self) -> None:
        self.kept[0] = None

    def forward(self, idx: Tensor, use_cache: bool = False) -> Tensor:
        if not use_cache:
            return self.step(idx, None)[0]
        logits, self.kept[0], _ = self.step(idx, self.kept[0])
        return logits


@pytest.mark.parametrize("factory", [Enabled, Installed, Placed, PlacedAtOnce, Asked])
def test_a_cache_is_set_up_by_a_method(factory: Any) -> None:
    subject = Subject(factory)
    assert subject.convention.cache_on_module
    needs_it = factory is PlacedAtOnce
    assert subject.convention.always_cached is needs_it
    assert (subject.missing("gradient") is None) is not needs_it
    skipped = {"decode.unrelated_call"} if needs_it else set()
    assert verdicts(subject, DECODE) == {id: "skipped" if id in skipped else "passed" for id in DECODE}


def test_the_method_is_named_and_calls_without_a_cache_can_be_trained() -> None:
    assert Subject(Enabled).describe() == "forward(idx); the cache is on the module, set up by enable_kv_cache"
    assert set(verdicts(Placed, ("gradients.reach*", "decode.no_graph")).values()) == {"passed"}


class TopLeft(Enabled):
    def seen(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).tril()


class LeavesTheOld(Installed):
    """A second set-up goes on with the first one's tokens."""

    def install_kv_cache(self, batch_size: int, max_len: int) -> None:
        if self.cache is None or len(self.cache.held[0]) != batch_size:
            super().install_kv_cache(batch_size, max_len)


@pytest.mark.parametrize(("factory", "check"), [(TopLeft, "decode.cached_equals_full"), (LeavesTheOld, "decode.reset")])
def test_its_bugs_are_seen(factory: Any, check: str) -> None:
    (result,) = check_causal_lm(factory, profile="quick", only=[check]).results
    assert result.status == "failed"


class Tables(Past):
    """Methods that make tables are called alike, and so is one that begins nothing."""

    table: Any = None

    def build_rope_cache(self, seq_len: int) -> None:
        self.table = torch.arange(seq_len)

    def init_state(self) -> None:
        self.started = True

    def forward(self, idx: Tensor) -> Tensor:
        return self.step(idx, None)[0]


def test_a_table_is_no_cache() -> None:
    found = Subject(Tables).convention
    assert (found.cache_on_module, found.missing["cache"]) == (False, "forward has no past_key_values")


def test_what_was_set_up_is_taken_away_and_put_back() -> None:
    module = Installed(DIYConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, max_seq_len=8))
    before = state_of(module)
    module.install_kv_cache(1, 8)
    installed = installed_by("install_kv_cache", before)
    assert installed is not None
    cache = module.cache
    with installed.removed(module):
        assert module.cache is None
        assert cache not in list(module.children())
    assert module.cache is cache
    assert cache in list(module.children())


def test_what_cannot_be_put_back_is_left_alone() -> None:
    module = nn.Module()
    module.table = torch.zeros(1)
    before = state_of(module)
    assert installed_by("init_cache", before) is None
    module.table = torch.zeros(2)
    assert installed_by("init_cache", before) is None


class WantsPositions(Past):
    """As in torchtune: once caches are set up, there is no call without positions."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cache: Any = None
        self.longest = config.max_seq_len

    def setup_caches(self, batch_size: int) -> None:
        self.cache = Kept(batch_size, self.embed.weight, self.longest)

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        if self.cache is None:
            return self.step(tokens, None)[0]
        if input_pos is None:
            raise ValueError("Caches are setup, but the position of input token is missing")
        start = int(input_pos.flatten()[0])
        logits, _, new = self.step(tokens, self.cache.held[:, :, :start] if start else None)
        self.cache.put(start, new)
        return logits


def test_a_module_that_has_no_uncached_call_after_a_cached_one_is_not_blamed_for_that() -> None:
    report = check_causal_lm(WantsPositions, profile="quick", only=["decode.*", "modes.call_leaves_mode"])
    assert report.verdict == "passed", report.to_text()
    found = {result.check.id: result for result in report.results}
    assert {found[id].status for id in ("decode.cached_equals_full", "decode.session")} == {"passed"}
    assert found["modes.call_leaves_mode"].status == "passed"
    assert found["decode.unrelated_call"].reason == (
        "once the module has a cache, a call without it is refused: ValueError: Caches are setup, but the position of "
        "input token is missing"
    )
