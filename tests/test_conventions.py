"""Ways of calling that were met in public code and once taken for others, each as a small model."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify import Subject, check_causal_lm
from diymodel.verify.calling.cache_of_generate import ways_of_generate
from diymodel.verify.calling.signature import parameter_names, parameters, required_parameters
from diymodel.verify.convention import Convention
from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from tests.test_adapters import Tiny, causal, verdicts
from tests.test_probing import Causal

CALLED = ("shape.*", "causality.edit", "batch.row_alone", "decode.c*", "loss.value", "generation.*")


def convention(factory: Any) -> Convention:
    return Subject(factory).convention


class Past(Tiny):
    """Keys and values (2, B, T, d), handed back whole; a bug may be planted in where its mask stands."""

    def step(self, ids: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the keys and values of all tokens, and of the new ones."""
        start = 0 if past is None else past.shape[2]
        T = ids.shape[1]
        x = self.embed(ids) + self.positions(torch.arange(start, start + T, device=ids.device))
        q, *new = self.qkv(x).chunk(3, -1)
        present = torch.stack(new) if past is None else torch.cat((past, torch.stack(new)), 2)
        k, v = present
        seen = self.seen(T, start + T)
        y = (q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.head(x + y), present, torch.stack(new)

    def seen(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool, device=self.embed.weight.device).tril(S - T)


class OtherName(Past):
    def forward(self, idx: Tensor, past_kvs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.step(idx, past_kvs)[:2]


class NamedAtLength(Past):
    def forward(self, x: Tensor, past_key_value_states: Tensor | None = None, use_cache: bool = False) -> Any:
        logits, present, _ = self.step(x, past_key_value_states)
        return (logits, present) if use_cache else logits


class OtherNameTopLeft(OtherName):
    """The mask of ``is_causal=True``, which one query on a cache passes for the first key."""

    def seen(self, T: int, S: int) -> Tensor:
        return torch.ones(T, S, dtype=torch.bool).tril()


class Switched(Past):
    """``cache`` is a switch, and no cache."""

    def forward(self, idx: Tensor, kv_cache_list: Tensor | None = None, cache: bool = False) -> Any:
        logits, present, _ = self.step(idx, kv_cache_list)
        return (logits, present) if cache else logits


@pytest.mark.parametrize(
    ("factory", "past", "switch"),
    [
        (OtherName, "past_kvs", None),
        (Switched, "kv_cache_list", "cache"),
        (NamedAtLength, "past_key_value_states", "use_cache"),
    ],
)
def test_a_cache_is_known_by_what_its_name_is_made_of(factory: Any, past: str, switch: str | None) -> None:
    assert (convention(factory).past, convention(factory).use_cache) == (past, switch)
    assert verdicts(factory, CALLED)["decode.cached_equals_full"] == "passed"


def test_its_bugs_are_seen() -> None:
    with pytest.raises(AssertionError, match=r"✗ decode\.cached_equals_full"):
        verdicts(OtherNameTopLeft, CALLED)


class HandsBackTheNew(Past):
    """As OpenAI's GPT-2 did: the caller puts them behind the others."""

    def forward(self, x: Tensor, past: Tensor | None = None) -> dict[str, Tensor]:
        logits, _, new = self.step(x, past)
        return {"logits": logits, "presents": new}


def test_what_is_of_the_new_tokens_alone_is_joined_by_the_caller() -> None:
    assert convention(HandsBackTheNew).cache_is_new_part == -2
    assert "to which the caller adds what comes back" in convention(HandsBackTheNew).describe()
    assert verdicts(HandsBackTheNew, CALLED)["decode.chunks"] == "passed"


class FilledList(Past):
    """A list with a place for each layer, which it takes for granted."""

    def forward(self, inputs: Tensor, kv_caches: list[Tensor | None]) -> Tensor:
        logits, kv_caches[0], _ = self.step(inputs, kv_caches[0])
        return logits


class BesideTheWhole(Past):
    """lucidrains' local-attention: the whole sequence stands beside its cache, and the last token of it is new."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, return_cache: bool = False) -> Any:
        assert cache is None or mask is None, "only allow caching for specific configuration"
        placed = self.embed(x) + self.positions(torch.arange(x.shape[1]))
        q, k, v = self.qkv(placed if cache is None else placed[:, -1:]).chunk(3, -1)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 1), torch.cat((cache[1], v), 1)
        hidden = ~self.seen(q.shape[1], k.shape[1])
        if mask is not None:
            hidden = hidden | ~mask.bool()[:, None]
        scores = (q @ k.transpose(1, 2)).masked_fill(hidden, torch.finfo(q.dtype).min)
        logits = self.head(placed[:, -q.shape[1] :] + scores.softmax(-1) @ v)
        return (logits, torch.stack((k, v))) if return_cache else logits


class CacheForNothing(BesideTheWhole):
    """Given the whole sequence it is right, and computes it anew."""

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None, return_cache: bool = False) -> Any:
        return super().forward(x, mask, None, return_cache)


def test_the_whole_sequence_is_given_beside_a_cache_that_counts_on_it() -> None:
    subject = Subject(BesideTheWhole)
    assert subject.convention.cached_gets_all
    assert subject.describe().endswith("beside which the whole sequence is given")
    reasons = {
        "chunks": "of several tokens, a call on the cache takes the last one alone",
        "padded_cache": "with forward(mask=…) a call on the cache is refused: AssertionError: only allow caching",
    }
    for capability, reason in reasons.items():
        assert reason in (subject.missing(capability) or "")
    found = verdicts(BesideTheWhole, ("decode.*", "padding.*", "batch.*"))
    assert all(found[f"decode.{id}"] == "passed" for id in ("cached_equals_full", "branch", "rows_reordered"))


def test_the_whole_sequence_is_not_given_to_a_module_that_makes_nothing_of_its_cache() -> None:
    assert not convention(CacheForNothing).cached_gets_all
    report = check_causal_lm(CacheForNothing, profile="quick", only=("decode.cached_equals_full",))
    assert [result.status for result in report.results] == ["failed"]


class Places:
    """ohara's cache of one layer: as long as the sequence may be, filled at the place that the caller names."""

    def __init__(self, keys: Tensor) -> None:
        self.held = torch.stack((keys, keys))

    def put(self, start: int, new: Tensor) -> Tensor:
        self.held[:, :, start : start + new.shape[2]] = new
        return self.held[:, :, : start + new.shape[2]]


class PlacedOnItsCache(Past):
    """ohara: ``position_ids`` is a number, and goes with a cache only."""

    def build_kv_cache(self, batch_size: int = 1) -> list[Places]:
        weight = self.embed.weight
        return [Places(weight.new_zeros(batch_size, self.positions.num_embeddings, weight.shape[1]))]

    def forward(
        self, input_ids: Tensor, kv_cache: list[Places] | None = None, position_ids: int | None = None
    ) -> Tensor:
        if (kv_cache is None) != (position_ids is None):
            raise ValueError("position_ids goes with a cache, and a cache with position_ids")
        start, T = position_ids or 0, input_ids.shape[1]
        x = self.embed(input_ids) + self.positions(torch.arange(start, start + T))
        q, *new = self.qkv(x).chunk(3, -1)
        k, v = torch.stack(new) if kv_cache is None else kv_cache[0].put(start, torch.stack(new))
        hidden = ~self.seen(T, start + T)
        return self.head(x + (q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1) @ v)


def test_a_cache_may_want_to_be_told_where_its_new_tokens_stand() -> None:
    found = convention(PlacedOnItsCache)
    assert (found.start, found.positions, found.placed_on_cache) == ("position_ids", None, True)
    passed = verdicts(PlacedOnItsCache, CALLED)
    assert {id for id, status in passed.items() if id.startswith("decode.") and status == "passed"}


class ToldItsLength(Past):
    """templateGPT: the cache comes with the number of its tokens. What is called a rope cache is none of these."""

    def build_rope_cache(self, idx: Tensor) -> Tensor:
        return self.positions(idx)

    def forward(self, input_ids: Tensor, kv_cache: Tensor | None = None, cache_len: int = 0) -> tuple[Tensor, Tensor]:
        past = None if kv_cache is None else kv_cache[:, :, :cache_len]
        return self.step(input_ids, past)[:2]


def test_a_cache_may_come_with_the_number_of_its_tokens() -> None:
    found = convention(ToldItsLength)
    assert (found.past, found.start, found.new_cache) == ("kv_cache", "cache_len", None)
    passed = verdicts(ToldItsLength, CALLED)
    assert passed["decode.cached_equals_full"] == "passed"


class EmptyTensors(Past):
    """nanoGPTplus: a list of empty tensors is begun with, which only its generate tells, as it does of the switch."""

    def forward(self, idx: Tensor, *, inference: bool = False, kv_cache: list[Tensor] | None = None) -> Any:
        past = kv_cache[0] if kv_cache is not None and kv_cache[0].numel() else None
        logits, present, _ = self.step(idx, past)
        return (logits[:, -1:], [present]) if inference else logits

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, use_kv_cache: bool = False) -> Tensor:
        self.eval()
        cache = [torch.empty(2, 0, dtype=idx.dtype)] if use_kv_cache else None
        for step in range(max_new_tokens):
            new = idx[:, -1:] if cache is not None and step else idx
            logits, cache = self.forward(new, inference=True, kv_cache=cache)
            cache = cache if use_kv_cache else None
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), 1)
        return idx


class NoneByName(EmptyTensors):
    """A dict a layer, whose keys and values are None before the first call."""

    def forward(self, idx: Tensor, *, inference: bool = False, kv_cache: list[dict[str, Any]] | None = None) -> Any:
        if kv_cache is None:
            return self.step(idx, None)[0]
        held = kv_cache[0]
        past = None if held["k"] is None else torch.stack((held["k"], held["v"]))
        logits, (k, v), _ = self.step(idx, past)
        return logits, [{"k": k, "v": v}]

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:  # type: ignore[override]
        cache: list[dict[str, Any]] = [{"k": None, "v": None}]
        for step in range(max_new_tokens):
            logits, cache = self(idx[:, -1:] if step else idx, kv_cache=cache)
            idx = torch.cat((idx, logits[:, -1:].argmax(-1)), 1)
        return idx


class TakesKeysForValues(NoneByName):
    def step(self, ids: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return super().step(ids, past if past is None else past.flip(0))


@pytest.mark.parametrize("factory", [EmptyTensors, NoneByName])
def test_a_cache_is_begun_as_the_modules_own_generate_begins_it(factory: Any) -> None:
    found = convention(factory)
    assert found.new_cache is not None
    assert found.cached_extra == ({"inference": True} if factory is EmptyTensors else {})
    assert ("with inference=True" in found.describe()) is (factory is EmptyTensors)
    passed = verdicts(factory, ("decode.*", "generation.*greedy*"))
    assert {passed[f"decode.{id}"] for id in ("cached_equals_full", "branch", "session")} == {"passed"}


def test_what_its_generate_begins_with_is_no_excuse_for_what_comes_of_it() -> None:
    report = check_causal_lm(TakesKeysForValues, profile="quick", only=("decode.cached_equals_full",))
    assert [result.status for result in report.results] == ["failed"]


def test_looking_at_what_generate_begins_with_leaves_the_module_as_it_was() -> None:
    config = DIYConfig(vocab_size=8, hidden_size=4, num_layers=1, num_heads=1, max_seq_len=8)
    module = EmptyTensors(config)
    before = module.forward
    assert len(list(ways_of_generate(module, config, Convention("idx", past="kv_cache")))) == 1
    assert module.training
    assert module.forward == before


class HiddenBesideItsCache(Past):
    """open_lm: what comes between the logits and the cache is a tensor of hidden states."""

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor] | None = None, use_cache: bool = False) -> Any:
        logits, present, _ = self.step(input_ids, None if past_key_values is None else past_key_values[0])
        return logits, self.embed(input_ids), [present]


class TakesTheLast(Past):
    """minGRU's: beside its hidden states the last token alone is looked at, whatever is given."""

    def forward(self, x: Tensor, prev_hiddens: list[Tensor] | None = None, return_prev_hiddens: bool = False) -> Any:
        if prev_hiddens is not None:
            x = x[:, -1:]
        logits, present, _ = self.step(x, None if prev_hiddens is None else prev_hiddens[0])
        return (logits, [present]) if return_prev_hiddens else logits


def test_a_cache_is_told_from_hidden_states() -> None:
    assert verdicts(HiddenBesideItsCache, CALLED)["decode.chunks"] == "passed"


def test_a_call_that_takes_the_last_token_alone_takes_no_chunks() -> None:
    assert (convention(TakesTheLast).past, convention(TakesTheLast).cached_gets_all) == ("prev_hiddens", False)
    found = verdicts(TakesTheLast, CALLED)
    assert (found["decode.cached_equals_full"], found["decode.chunks"]) == ("passed", "skipped")


class MaskOfNewTokens(OtherName):
    """Where there are several tokens, the mask is of them alone: on a cache it does not fit (mini-deepseek)."""

    def seen(self, T: int, S: int) -> Tensor:
        return super().seen(T, T if T > 1 else S)


class RefusesSeveral(OtherName):
    def seen(self, T: int, S: int) -> Tensor:
        assert T in (1, S), "one token at a time"
        return super().seen(T, S)


def test_a_mask_that_does_not_fit_a_chunk_is_a_bug_and_no_refusal_of_chunks() -> None:
    assert "one token at a time" in convention(RefusesSeveral).missing["chunks"]
    only = ["decode.chunks", "decode.cached_equals_full", "decode.session", "decode.long_row"]
    report = check_causal_lm(MaskOfNewTokens, profile="quick", only=only)
    assert [result.check.id for result in report.failed] == ["decode.chunks"], "the others add one token at a time"


@pytest.mark.parametrize(
    ("past", "use_cache"),
    [("memories", "return_memory"), ("prev_state", "return_next_state"), ("hiddens", "return_hiddens")],
)
def test_states_have_many_names(past: str, use_cache: str) -> None:
    module = nn.Module()
    namespace: dict[str, Any] = {}
    exec(f"def forward(x, {past}=None, {use_cache}=False): ...", namespace)
    module.forward = namespace["forward"]
    assert parameter_names(module) == {"ids": "x", "past": past, "use_cache": use_cache}


def test_a_switch_for_memories_is_none_for_a_cache_of_keys_and_values() -> None:
    module = nn.Module()
    namespace: dict[str, Any] = {}
    exec("def forward(x, past_memories=None, cached_kv=None, return_new_memories=False): ...", namespace)
    module.forward = namespace["forward"]
    assert parameter_names(module) == {"ids": "x", "past": "cached_kv"}


class OneAtATime(Past):
    """hkproj's pytorch-llama: the cache is on the module, and takes one token at a time."""

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        assert tokens.shape[1] == 1, "Only one token at a time can be processed"
        past = self.held[:, :, :start_pos] if start_pos else None
        logits, self.held, _ = self.step(tokens, past)
        return logits


class ForgetsItsStart(OneAtATime):
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        return super().forward(tokens, 0)


def test_tokens_are_fed_one_at_a_time_to_a_module_that_takes_no_more() -> None:
    assert convention(OneAtATime).one_at_a_time
    assert "every call is on it, one token at a time" in convention(OneAtATime).describe()
    found = verdicts(OneAtATime, ("shape.*", "sensitivity.*", "decode.*", "state.*"))
    assert (found["sensitivity.sees_itself_and_its_past"], found["decode.chunks"]) == ("passed", "skipped")
    with pytest.raises(AssertionError, match=r"✗ sensitivity\.sees_itself_and_its_past"):
        verdicts(ForgetsItsStart, ("sensitivity.*",))


class MaskOfTheNew(Past):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past: Any = None, use_cache: bool = False
    ) -> Any:
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError("the mask is of the tokens that are given")
        logits, present, _ = self.step(input_ids, past)
        return (logits, present) if use_cache else logits


def test_a_mask_of_the_new_tokens_says_nothing_of_padding_in_the_cache() -> None:
    subject = Subject(MaskOfTheNew)
    why = "forward(attention_mask=…) covers the new tokens only, not the padding in the cache"
    assert (subject.missing("padded_cache"), subject.missing("cache")) == (why, None)


class ListUnused(Causal):
    def forward(self, input_ids: Tensor, state: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


def test_an_empty_list_is_tried_for_a_cache_and_must_be_filled() -> None:
    found = convention(FilledList)
    assert found.always_cached
    assert not found.cache_is_value
    passed = verdicts(FilledList, (*CALLED, "decode.unrelated_call"))
    assert passed["decode.cached_equals_full"] == passed["decode.unrelated_call"] == "passed"
    assert "handed no cache back" in convention(ListUnused).missing["cache"]


class StartWithoutState(Tiny):
    """Where the first token stands is all that it is told: it keeps nothing."""

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Tensor:
        return self.run(tokens, causal, torch.arange(start_pos, start_pos + tokens.shape[1]))


def test_a_start_alone_makes_no_cache() -> None:
    found = convention(StartWithoutState)
    assert (found.cache_on_module, found.always_cached) == (False, False)
    assert found.missing["cache"] == "forward(start_pos=…) leaves nothing on the module for a later call to go on with"
    assert found.missing.keys().isdisjoint({"gradient", "graph"})


class CacheSwitchedOff(Tiny):
    """Its kind of cache is a setting, and this one keeps nothing (DenseFormer)."""

    def forward(self, idx: Tensor, use_cache: bool = False) -> Tensor:
        return self.run(idx, causal)

    def clear_state(self) -> None: ...


def test_a_switch_for_a_cache_that_keeps_nothing_makes_none() -> None:
    found = convention(CacheSwitchedOff)
    assert (found.cache_on_module, found.always_cached) == (False, False)
    assert found.missing["cache"] == "forward(use_cache=…) leaves nothing on the module for a later call to go on with"


class StartAndLastLogits(StartWithoutState):
    """nanoGPT's forward, told where the first token stands (rudi77/nanodeepseek)."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, targets: Tensor | None = None, start_pos: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        logits = super().forward(tokens, start_pos)
        if targets is None:
            return logits[:, -1:], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_a_start_that_makes_no_cache_keeps_no_labels_from_a_call() -> None:
    found = convention(StartAndLastLogits)
    assert (found.logits_need_labels, found.last_only, found.always_cached) == (True, False, False)
    statuses = verdicts(StartAndLastLogits, ("loss.value", "loss.many_labels", "gradients.reach_every_parameter"))
    assert set(statuses.values()) == {"passed"}


class InPlaceOfForward(Tiny):
    """labml's hourglass transformer has no forward."""

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        return self.run(x, causal), None


def test_a_module_may_define_call_in_the_place_of_forward() -> None:
    assert verdicts(InPlaceOfForward, ("causality.edit", "gradients.reach_every_parameter")) == {
        "causality.edit": "passed",
        "gradients.reach_every_parameter": "passed",
    }


class BesideItsConfidence(Tiny):
    """What it returns beside the logits has as many columns as there are tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.run(x, causal)
        return logits, logits.softmax(-1).amax(-1).flatten()[None]


def test_what_stands_beside_the_logits_tells_no_vocabulary() -> None:
    subject = Subject(BesideItsConfidence)
    assert "whatever the configuration says" not in subject.describe()
    assert verdicts(subject, ("shape.logits",)) == {"shape.logits": "passed"}


class Flat(Tiny):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal).flatten(0, 1)


class FlatSequenceFirst(Tiny):
    def forward(self, src: Tensor) -> Tensor:
        return self.run(src.t(), causal).transpose(0, 1).flatten(0, 1)


class LastOnly(Tiny):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, causal)[:, -1]


class LastOfPast(Past):
    def forward(self, idx: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits, present, _ = self.step(idx, past)
        return logits[:, -1:], present


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        (Flat, {"last_only": False}),
        (FlatSequenceFirst, {"last_only": False, "sequence_first": True}),
        (LastOnly, {"last_only": True}),
        (LastOfPast, {"last_only": True, "past": "past"}),
    ],
)
def test_logits_of_two_dimensions_or_of_one_position_are_understood(factory: Any, found: dict[str, Any]) -> None:
    assert {name: getattr(convention(factory), name) for name in found} == found
    statuses = verdicts(factory, CALLED)
    assert {statuses["shape.logits"], statuses["causality.edit"]} == {"passed"}
    assert statuses["decode.cached_equals_full"] == ("passed" if "past" in found else "skipped")


class LastOnlyPadded(Tiny):
    """It takes positions, and counts its own."""

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        def masked(scores: Tensor) -> Tensor:
            hidden = scores.new_zeros(tokens.shape) if attention_mask is None else (attention_mask == 0).to(scores)
            return causal(scores) - 1e9 * hidden[:, None, None]

        return self.run(tokens, masked)[:, -1]


def test_positions_are_handed_to_every_prefix() -> None:
    assert convention(LastOnlyPadded).last_only
    with pytest.raises(AssertionError, match=r"✗ padding\.positions_are_used"):
        verdicts(LastOnlyPadded, ("padding.positions_are_used",))


class LastOnlyLeaks(LastOnly):
    """Every position sees the whole row: with one position at a time that is right, and shows nowhere."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.run(tokens, lambda scores: scores)[:, -1] + tokens.roll(1, 0).sum(1, keepdim=True) / 1e3


def test_a_model_of_one_position_is_judged_by_its_prefixes() -> None:
    with pytest.raises(AssertionError, match=r"✗ batch\.row_alone"):
        verdicts(LastOnlyLeaks, CALLED)


Logits = namedtuple("Logits", ["logits"])


class ObjectInTuple(Causal):
    def forward(self, input_ids: Tensor) -> tuple[Logits, None]:  # type: ignore[override]
        return Logits(super().forward(input_ids)), None


class PlaceForLogits(Causal):
    """x-transformers of 2026: what comes beside the logits has a place for some as well, which is empty."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Logits]:  # type: ignore[override]
        return super().forward(input_ids), Logits(None)


@pytest.mark.parametrize("factory", [ObjectInTuple, PlaceForLogits])
def test_logits_are_found_in_a_tuple_with_an_object(factory: Any) -> None:
    assert verdicts(factory, ("shape.*", "causality.edit"))["shape.logits"] == "passed"


class Parts(Causal):
    """A total of what it is made of, first: the next token's loss, and one that keeps logits small."""

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        if targets is None:
            return logits
        main = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        small = logits.logsumexp(-1).square().mean()
        return logits, main + small / 10, main, small


class WrongParts(Parts):
    """Neither is the mean over the scored tokens."""

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        logits, *parts = super().forward(input_ids, targets) if targets is not None else (super().forward(input_ids),)
        return (logits, *(part / 2 for part in parts)) if parts else logits


def test_of_several_scalars_the_loss_is_that_of_the_next_token() -> None:
    assert convention(Parts).loss_place == 1
    assert verdicts(Parts, ("loss.value",)) == {"loss.value": "passed"}
    with pytest.raises(AssertionError, match=r"✗ loss\.value"):
        verdicts(WrongParts, ("loss.value",))


def one_head(config: Any) -> nn.Module:
    if config.num_heads > 1:
        raise NotImplementedError
    return Causal(config)


def test_a_family_of_one_head_is_tried_with_one_and_a_bare_refusal_is_told_by_its_line() -> None:
    subject = Subject(one_head)
    assert (
        verify_one(subject, next(c for c in list_checks() if c.id == "shape.logits"), Settings(20)).status == "passed"
    )
    assert subject.refusal.startswith("NotImplementedError: raise NotImplementedError (tests/test_conventions.py:")


class TargetsShiftedInside(Causal):
    """The names of nanoGPT, whose caller shifts the targets; a loop like its own would shift these twice."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
        logits = super().forward(idx)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def test_targets_that_are_shifted_once_more_are_told_of() -> None:
    assert (
        "targets are shifted inside the module, so its caller must not shift them"
        in Subject(TargetsShiftedInside).describe()
    )


class TargetsAtEachCall(Causal):
    """No call goes without targets, which are as many as the tokens."""

    def forward(self, idx: Tensor, targets: Tensor) -> Any:  # type: ignore[override]
        assert targets.shape == idx.shape
        logits = super().forward(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def test_targets_that_no_call_goes_without_are_always_given() -> None:
    found = verdicts(TargetsAtEachCall, ("shape.logits", "causality.edit", "loss.value", "loss.labels_change_no_logit"))
    assert found == {id: "skipped" if id == "loss.labels_change_no_logit" else "passed" for id in found}
    assert Subject(TargetsAtEachCall).missing("labelled_logits") == "no call goes without targets"


class CountsWhatItLost(Past):
    """nanoGPT-Modern: ``start_pos`` is how many tokens a rolling cache has lost; those in it are counted in forward."""

    def forward(
        self, idx: Tensor, past_kvs: Tensor | None = None, use_cache: bool = False, start_pos: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if start_pos:
            idx = idx.roll(start_pos, 1)  # as wrong as any position that is counted twice
        logits, present, _ = self.step(idx, past_kvs)
        return (logits * (1 + start_pos), present) if use_cache else logits


class MustBeTold(CountsWhatItLost):
    def forward(  # type: ignore[override]
        self, idx: Tensor, start_pos: int, past_kvs: Tensor | None = None, use_cache: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(idx, past_kvs, use_cache, start_pos)


def test_an_optional_start_is_not_given_where_the_next_token_is_wrong_with_it() -> None:
    assert convention(CountsWhatItLost).start is None
    assert verdicts(CountsWhatItLost, ("decode.c*",))["decode.cached_equals_full"] == "passed"
    assert convention(MustBeTold).start == "start_pos"
    (result,) = check_causal_lm(MustBeTold, only=["decode.cached_equals_full"], profile="quick").results
    assert result.status == "failed"


class Smallest(Tiny):
    """As Llama in transformers: the mask holds the type's smallest number, and the softmax works in float32."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.again = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        T = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids) + self.positions((real.cumsum(1) - 1).clamp(min=0))
        hidden = ~(torch.ones(T, T, dtype=torch.bool).tril() & (real[:, None] > 0))
        for layer in (self.qkv, self.again):  # in the second, what came of rows of nothing else reaches the others
            q, k, v = layer(x).chunk(3, -1)
            scores = (q @ k.transpose(1, 2)).masked_fill(hidden, torch.finfo(q.dtype).min)
            x = x + scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return self.head(x)


def test_padding_on_the_left_is_found_where_it_overflows_in_float64_alone() -> None:
    found = convention(Smallest)
    assert (found.dtype, found.padded_dtype, found.pads_left) == (torch.float64, torch.float32, True)


class Masks(Tiny):
    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        return self.run(x, lambda scores: scores if masks is None else scores.masked_fill(masks == 0, -torch.inf))


def test_a_causal_mask_may_be_called_masks() -> None:
    assert convention(Masks).causal == "masks"


class Hooked(Causal):
    """TransformerLens: ids go to ``input``, and ``tokens`` beside it is for hooks."""

    def forward(self, input: Tensor, tokens: Tensor | None = None, hooks: Any = None) -> Tensor:  # type: ignore[override]  # noqa: A002
        return super().forward(input)


def test_token_ids_go_to_what_must_be_given_and_what_is_not_given_is_told() -> None:
    found = convention(Hooked)
    assert found.ids == "input"
    assert found.describe() == "forward(input); not given: tokens, hooks"


class Memory(nn.Module):
    """lucidrains' feedback transformer: ``memory`` is the cache that ``return_memory`` asks for."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rnn = nn.GRU(config.hidden_size, config.hidden_size, batch_first=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor, memory: Tensor | None = None, return_memory: bool = False) -> Any:
        y, memory = self.rnn(self.embed(x), memory)
        return (self.head(y), memory) if return_memory else self.head(y)


def test_memory_is_a_cache_where_forward_is_asked_for_it() -> None:
    assert (convention(Memory).past, convention(Memory).use_cache) == ("memory", "return_memory")


class Segments(Tiny):
    """Transformer-XL: only a whole segment is remembered, and of less it keeps nothing."""

    def forward(self, x: Tensor, memories: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.run(x, lambda scores: causal(scores)), self.embed(x)[:, :0]


def test_a_memory_of_segments_is_no_cache() -> None:
    lacking = convention(Segments).missing["cache"]
    assert lacking == "forward(memories=…) of a few tokens hands back tensors without elements"


class Crowded(Tiny):
    """Tokens of earlier rows crowd out others, as in a mixture of experts with a capacity."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.run(x, causal)
        return torch.where((x == x.flatten()[0])[..., None].cumsum(0) > 2, logits * 2, logits)


def test_rows_that_reach_each_other_are_no_sign_that_the_sequence_comes_first() -> None:
    assert not convention(Crowded).sequence_first


class ReadsOthers(Causal):
    """MiniMind and happy-llm look some arguments up by name."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **others: Any) -> Tensor:
        others["unread"] = 0
        if "attention_mask" in others:
            self.told = others["attention_mask"]
        start, cached = others.get("start_pos", 0), others.pop("use_cache", False)
        assert (start, cached) == (0, False)
        return super().forward(tokens)


class PassesOn(Causal):
    """What is looked up in another mapping is no argument."""

    def forward(self, tokens: Tensor, **others: Any) -> Tensor:
        return super().forward(tokens, **{} if "labels" in self.__dict__ else others)


class StepsAlone(Causal):
    """Its cache, a dict, takes one token a call; without one, forward takes all."""

    def forward(self, tokens: Tensor, state: dict[str, Tensor] | None = None) -> Any:
        x = self.embed(tokens)
        if state is None:
            return self.head(x.cumsum(1))
        (token,) = x.unbind(1)
        total = state.get("sum", 0) + token
        return self.head(total)[:, None], self.left(total)

    def left(self, total: Tensor) -> Any:
        return {"sum": total}


class LeavesATensor(StepsAlone):
    """xLSTM once handed back the state itself in place of the dict that its next step reads."""

    def left(self, total: Tensor) -> Any:
        return total


@pytest.mark.parametrize(("factory", "status"), [(StepsAlone, "passed"), (LeavesATensor, "failed")])
def test_a_cache_that_its_author_declares_is_tried_one_token_at_a_time(factory: Any, status: str) -> None:
    declared = Subject(factory, new_cache=lambda module, config, rows: {})
    assert declared.convention.one_at_a_time
    check = next(check for check in list_checks() if check.id == "decode.cached_equals_full")
    assert verify_one(declared, check, Settings(5)).status == status


def test_what_forward_looks_up_in_its_kwargs_is_a_parameter() -> None:
    config = DIYConfig(vocab_size=8, hidden_size=4, num_heads=1)
    known = parameters(ReadsOthers(config))
    assert list(known) == ["attention_mask", "start_pos", "use_cache", "tokens", "targets"]
    assert [known[name].default for name in ("attention_mask", "start_pos", "use_cache")] == [None, 0, False]
    assert required_parameters(ReadsOthers(config)) == {"tokens"}
    assert parameter_names(ReadsOthers(config))["mask"] == "attention_mask"
    assert list(parameters(PassesOn(config))) == ["tokens"]


def test_a_mask_that_is_looked_up_and_ignored_is_found() -> None:
    report = check_causal_lm(Subject(ReadsOthers), profile="quick", only=["padding.mask_is_used"])
    assert [result.check.id for result in report.failed] == ["padding.mask_is_used"]
