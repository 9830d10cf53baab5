"""A cache that is two arguments of forward: the keys, and the values."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diymodel.verify import Subject, check_causal_lm
from diymodel.verify.calling.outputs import read_output
from diymodel.verify.calling.signature import find_pair
from tests.test_adapters import verdicts
from tests.test_conventions import Past

DECODE = ("decode.cached_equals_full", "decode.chunks", "decode.branch", "decode.session", "decode.rows_reordered")


class Lists(Past):
    """A list of each, with a tensor a layer."""

    def forward(self, input_ids: Tensor, cache_k: Any = None, cache_v: Any = None) -> Any:
        past = None if cache_k is None else torch.stack((cache_k[0], cache_v[0]))
        logits, (k, v), _ = self.step(input_ids, past)
        return logits, [k], [v]


class Tensors(Past):
    """A tensor of each, with a dimension of layers; what comes back is of the new tokens."""

    def forward(self, x: Tensor, prev_keys: Any = None, prev_values: Any = None, use_cache: bool = False) -> Any:
        past = None if prev_keys is None else torch.cat((prev_keys, prev_values))
        logits, _, (k, v) = self.step(x, past)
        return (logits, k[None], v[None]) if use_cache else logits


class Named(NamedTuple):
    logits: Tensor
    value_cache: Any
    key_cache: Any


class Filled(Past):
    """Lists that the caller makes, with a place for each layer, are filled."""

    def forward(self, idx: Tensor, key_cache: list[Any], value_cache: list[Any]) -> Any:
        past = None if key_cache[0] is None else torch.stack((key_cache[0], value_cache[0]))
        logits, (key_cache[0], value_cache[0]), _ = self.step(idx, past)
        return Named(logits, value_cache, key_cache)


@pytest.mark.parametrize(
    ("factory", "pair", "found"),
    [
        (Lists, ("cache_k", "cache_v"), {"cache_is_value": True, "cache_is_new_part": None}),
        (Tensors, ("prev_keys", "prev_values"), {"cache_is_value": True, "cache_is_new_part": -2}),
        (Filled, ("key_cache", "value_cache"), {"cache_is_value": False, "always_cached": True}),
    ],
)
def test_keys_and_values_are_handed_over_apart(factory: Any, pair: tuple[str, str], found: dict[str, Any]) -> None:
    subject = Subject(factory)
    convention = subject.convention
    assert (convention.past, convention.past_values) == pair
    assert {name: getattr(convention, name) for name in found} == found
    skipped = set() if convention.cache_is_value else {"decode.branch", "decode.rows_reordered"}
    assert verdicts(subject, DECODE) == {id: "skipped" if id in skipped else "passed" for id in DECODE}


class KeysOfTheNewAlone(Lists):
    def forward(self, input_ids: Tensor, cache_k: Any = None, cache_v: Any = None) -> Any:
        start = 0 if cache_k is None else cache_k[0].shape[1]
        logits, keys, values = super().forward(input_ids, cache_k, cache_v)
        return logits, [torch.cat((keys[0][:, start:], keys[0][:, :start]), 1)], values


def test_a_bug_of_one_of_the_two_is_seen() -> None:
    report = check_causal_lm(KeysOfTheNewAlone, profile="quick", only=["decode.cached_equals_full"])
    assert [result.status for result in report.results] == ["failed"]


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["x", "v_cache", "k_cache"], ("k_cache", "v_cache")),
        (["past_k"], None),
        (["past_key_values", "value_cache"], None),
        (["mask_k", "mask_v"], None),
    ],
)
def test_a_pair_is_known_by_its_names(names: list[str], pair: tuple[str, str] | None) -> None:
    assert find_pair(names) == pair


def test_one_of_two_that_comes_back_is_no_cache() -> None:
    logits = torch.zeros(1, 2, 8)
    assert read_output((logits, [logits]), 8, paired=True).past is None
    assert read_output({"logits": logits, "cache_k": logits, "cache_v": None}, 8, paired=True).past is None
