"""The cache as a data structure: what it refuses, when it copies, how it grows, and what can be done to it by hand.

That decoding on it gives the uncached logits is checked by the harness: tests/properties.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.cache import FixedSlots, LayerCache, PastKeyValues, Span
from diymodel.verify.strategies import chunk_sizes, real_lengths
from tests.strategies import Case, assert_near, batches, cases

CONFIG = DIYConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=4, num_kv_heads=2, max_seq_len=200, dropout=0)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
NEXT = torch.tensor([[7], [8]])


@pytest.fixture(scope="module")
def model() -> DIYForCausalLM:
    return DIYForCausalLM(CONFIG).eval()


@pytest.fixture
def past(model: DIYForCausalLM) -> PastKeyValues:
    return model(IDS, use_cache=True)[1]


def address(past: PastKeyValues) -> int:
    return past[0][0]["k"].data_ptr()


def test_shape_of_the_cache(past: PastKeyValues) -> None:
    assert len(past) == CONFIG.num_layers
    for cached, cached_pos in past:
        assert set(cached) == {"k", "v"}
        assert len(cached) == 2
        assert cached["k"].shape == cached["v"].shape == (2, CONFIG.kv_heads, 3, CONFIG.head_size)
        assert cached_pos == 3
    with pytest.raises(KeyError, match="'q'"):
        past[0][0]["q"]
    assert repr(past[0][0]) == "LayerCache(k, v: (2, 2, 3, 2), capacity=64)"


def test_the_cache_cannot_be_assigned_to(past: PastKeyValues) -> None:
    with pytest.raises(TypeError):
        past[0][0]["k"] = torch.zeros(1)  # type: ignore[index]


def test_rows_of_different_length_have_a_position_each(model: DIYForCausalLM) -> None:
    _, past = model(IDS, seq_lengths=torch.tensor([1, 3]), use_cache=True)
    assert past[1][1].tolist() == [1, 3]
    _, past = model(NEXT, past_key_values=past, use_cache=True)
    assert past[1][1].tolist() == [2, 4]
    _, past = model(IDS, seq_lengths=torch.tensor([0, 2]), past_key_values=past, use_cache=True)
    assert past[1][1].tolist() == [2, 6]


def test_positions_are_compared_by_value(model: DIYForCausalLM) -> None:
    """Each layer may bring a tensor of its own."""
    _, past = model(IDS, seq_lengths=torch.tensor([1, 3]), use_cache=True)
    expected = model(NEXT, past_key_values=past)
    own = [(cached, position.clone()) for cached, position in past if isinstance(position, Tensor)]
    assert torch.equal(model(NEXT, past_key_values=own), expected)
    own[1][1][0] = 2
    with pytest.raises(ValueError, match="cached_pos of layer 1 is"):
        model(NEXT, past_key_values=own)


def test_rows_of_equal_length_share_a_position(model: DIYForCausalLM) -> None:
    _, past = model(IDS, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 0]]), use_cache=True)
    assert past[0][1] == 2
    logits, _ = model(NEXT, past_key_values=past, use_cache=True)
    torch.testing.assert_close(logits[:, 0], model(torch.cat((IDS[:, :2], NEXT), dim=1))[:, -1])


def test_appending_at_the_tip_is_in_place_until_the_buffer_is_full(model: DIYForCausalLM, past: PastKeyValues) -> None:
    addresses = []
    for _ in range(150):
        _, past = model(NEXT, past_key_values=past, use_cache=True)
        addresses.append(address(past))
    moves = sum(a != b for a, b in itertools.pairwise(addresses))
    assert moves == 2  # 3 + 150 positions: 64, then 130, then max_seq_len=200


def test_appending_copies_no_more_than_its_length_in_total() -> None:
    """Copying at every step would make the whole quadratic: length² / 2 positions."""
    config = DIYConfig(vocab_size=8, num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, max_seq_len=1000)
    model = DIYForCausalLM(config).eval()
    _, past = model(IDS[:1, :1], use_cache=True)
    copied = 0
    for length in range(1, config.max_seq_len):
        before = address(past)
        _, past = model(IDS[:1, :1], past_key_values=past, use_cache=True)
        copied += length if address(past) != before else 0
    assert copied <= config.max_seq_len


def test_a_cache_carries_no_graph_where_gradients_are_on(model: DIYForCausalLM) -> None:
    """Memory would grow with every step."""
    _, past = model(IDS, use_cache=True)
    _, past = model(NEXT, past_key_values=past, use_cache=True)
    assert not any(kv.requires_grad for cached, _ in past for kv in cached.values())


def test_positions_beyond_small_integers_go_on_in_place() -> None:
    """Python keeps one object for each integer up to 256, so that below, equal ones are the same."""
    keys, values = torch.randn(2, 1, 1, 300, 2)
    _, _, (cached, cached_pos) = Span.after(0, 0, 300, None).put(None, keys, values, 1000)
    assert isinstance(cached, LayerCache)
    assert cached.tip(int(str(cached_pos))) is cached._buffer


def test_rows_go_on_in_place_from_their_own_positions_only(model: DIYForCausalLM) -> None:
    _, past = model(IDS, seq_lengths=torch.tensor([1, 3]), use_cache=True)
    cached, cached_pos = past[0]
    assert isinstance(cached, LayerCache)
    assert isinstance(cached_pos, Tensor)
    assert cached.tip(cached_pos) is cached._buffer
    assert cached.tip(cached_pos.clone()) is None


def test_causality_needs_a_mask_only_behind_a_cache() -> None:
    assert Span.after(0, 0, 3, None).mask(torch.device("cpu")) is None
    assert Span.after(4, 4, 1, None).mask(torch.device("cpu")) is None
    mask = Span.after(2, 2, 2, None).mask(torch.device("cpu"))
    assert mask is not None
    assert mask.tolist() == [[True, True, True, False], [True] * 4]


def test_fixed_slots_are_written_in_place_and_seen_up_to_their_number() -> None:
    buffers = {"k": torch.zeros(2, 3, 6, 4), "v": torch.zeros(2, 3, 6, 4)}
    new = {name: torch.randn(2, 3, 1, 4) for name in buffers}
    past = buffers, 0
    k, v, present = FixedSlots(torch.tensor([1, 4]), 5).put(past, new["k"], new["v"], 6)
    assert present is past
    for name, seen in (("k", k), ("v", v)):
        expected = torch.zeros(2, 3, 6, 4)
        expected[0, :, 1], expected[1, :, 4] = new[name][0, :, 0], new[name][1, :, 0]
        assert torch.equal(buffers[name], expected)
        assert torch.equal(seen, expected[:, :, :5])


def test_a_second_continuation_copies_and_the_first_stays(model: DIYForCausalLM, past: PastKeyValues) -> None:
    first, one = model(NEXT, past_key_values=past, use_cache=True)
    held = one[0][0]["k"].clone()
    second, two = model(NEXT + 1, past_key_values=past, use_cache=True)
    assert address(one) == address(past) != address(two)
    assert torch.equal(one[0][0]["k"], held)
    assert not torch.equal(first, second)


def test_looking_ahead_without_keeping_leaves_the_cache_as_it_was(model: DIYForCausalLM, past: PastKeyValues) -> None:
    held = past[0][0]["k"].clone()
    expected, _ = model(NEXT, past_key_values=past, use_cache=True)
    ahead = model(NEXT, past_key_values=past)
    assert torch.equal(ahead, expected)
    assert torch.equal(past[0][0]["k"], held)


def test_a_failed_step_leaves_the_cache_usable(model: DIYForCausalLM, past: PastKeyValues) -> None:
    expected, _ = model(NEXT, past_key_values=past, use_cache=True)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(NEXT, past_key_values=past, use_cache=True)
    hook.remove()
    assert torch.equal(model(NEXT, past_key_values=past, use_cache=True)[0], expected)


def test_a_cache_made_in_inference_mode_goes_on_outside(model: DIYForCausalLM) -> None:
    with torch.inference_mode():
        _, past = model(IDS, use_cache=True)
        expected, _ = model(NEXT, past_key_values=past, use_cache=True)
    logits, past = model(NEXT, past_key_values=past, use_cache=True)
    torch.testing.assert_close(logits, expected.clone())
    model(NEXT, past_key_values=past, use_cache=True)


def test_a_deep_copy_goes_its_own_way(model: DIYForCausalLM, past: PastKeyValues) -> None:
    other = copy.deepcopy(past)
    expected, _ = model(NEXT, past_key_values=past, use_cache=True)
    logits, continued = model(NEXT, past_key_values=other, use_cache=True)
    assert torch.equal(logits, expected)
    assert address(continued) == address(other) != address(past)


def test_positions_are_made_on_the_device_of_the_tokens(model: DIYForCausalLM) -> None:
    """The meta device refuses to meet another one."""
    ids, there = IDS.to("meta"), copy.deepcopy(model).to("meta")
    _, past = there(ids, use_cache=True)
    logits, _ = there(ids, past_key_values=past, use_cache=True)
    assert logits.device == ids.device
    ragged = Span(ids[:, 0], ids[:, 1], 3, 6, 3)
    mask = ragged.mask(ids.device)
    assert mask is not None
    assert mask.device == ids.device
    keys = ids[:, None, :, None].float()
    assert ragged.put(None, keys, keys, 8)[0].device == ids.device


@given(case=cases(room=4), data=st.data())
def test_every_version_goes_on_from_any_position(case: Case, data: st.DataObject) -> None:
    """A smaller ``cached_pos`` takes a cache back, and whoever holds another version of it notices nothing."""
    model, longest = case.model(), case.config.max_seq_len
    versions = [(model(case.input_ids, use_cache=True)[1], case.input_ids)]
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        past, tokens = versions[data.draw(st.integers(0, len(versions) - 1), "version")]
        keep = data.draw(st.integers(0, min(tokens.shape[1], longest - 1)), "keep")
        new = data.draw(batches(case.config, case.num_rows, data.draw(st.integers(1, longest - keep))), "new")
        whole = torch.cat((tokens[:, :keep], new), dim=1)
        shorter = [(cached, keep) for cached, _ in past]
        if data.draw(st.booleans(), "kept"):
            logits, presents = model(new, past_key_values=shorter, use_cache=True)
            versions.append((presents, whole))
        else:
            logits = model(new, past_key_values=shorter)
        assert_near(logits, model(whole)[:, keep:])


@given(case=cases(room=2), data=st.data())
def test_rows_chosen_by_hand_go_on_as_those_rows(case: Case, data: st.DataObject) -> None:
    """More of them or fewer, as in a beam search that grows, or where some rows are finished."""
    rows = torch.tensor(data.draw(st.lists(st.integers(0, case.num_rows - 1), min_size=1, max_size=4), "rows"))
    new = data.draw(batches(case.config, len(rows), 2), "new")
    model = case.model()
    _, past = model(case.input_ids, use_cache=True)
    chosen = [({name: kv[rows] for name, kv in cached.items()}, position) for cached, position in past]
    whole = torch.cat((case.input_ids[rows], new), dim=1)
    assert_near(model(new, past_key_values=chosen), model(whole)[:, -2:])


@given(case=cases(min_rows=2), data=st.data())
def test_a_row_may_get_any_number_of_tokens_even_none(case: Case, data: st.DataObject) -> None:
    """In every call, on a cache or not; NaN stands at the padding and reaches no row."""
    padding = case.config.vocab_size - 1  # a token that stands at no real position
    healthy, poisoned = case.model(), case.model()
    poisoned.model.embed_tokens.weight.data[padding] = torch.nan
    past, rows = None, range(case.num_rows)
    fed: list[list[int]] = [[] for _ in rows]
    seen: list[list[Tensor]] = [[] for _ in rows]
    for size in data.draw(chunk_sizes(case.config.max_seq_len), "sizes"):
        counts = data.draw(real_lengths(case.num_rows, size, shortest=0), "counts")
        ids = data.draw(batches(case.config, case.num_rows, size), "ids").clamp(max=padding - 1)
        real = torch.arange(size) < torch.tensor(counts)[:, None]
        logits, past = poisoned(ids.where(real, padding), seq_lengths=real.sum(1), past_key_values=past, use_cache=True)
        for row in rows:
            fed[row] += ids[row][real[row]].tolist()
            seen[row].append(logits[row][real[row]])
    for row in rows:
        if fed[row]:  # with tied weights, the head's row of the padding token is NaN as well
            assert_near(torch.cat(seen[row])[:, :padding], healthy(torch.tensor([fed[row]]))[0, :, :padding])


def replaced(past: PastKeyValues, layer: int, entry: Any) -> PastKeyValues:
    return [entry if i == layer else kept for i, kept in enumerate(past)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: "cache", TypeError, "list of .cached, cached_pos. that the model returned, got str"),
        (lambda p: p[:1], ValueError, "the cache has 1 layers and the model has 2"),
        (lambda p: replaced(p, 1, p[1][0]), TypeError, r"past_key_values\[1\] must be a pair"),
        (
            lambda p: replaced(p, 0, ({"k": p[0][0]["k"]}, 3)),
            ValueError,
            r"exactly the entries 'k' and 'v', got \['k'\]",
        ),
        (lambda p: replaced(p, 1, (p[1][0], 2)), ValueError, "cached_pos of layer 1 is 2 and of layer 0 3"),
        (
            lambda p: replaced(p, 1, (p[1][0], torch.tensor([3, 3]))),
            ValueError,
            r"cached_pos of layer 1 is tensor\(\[3, 3\]\) and of layer 0 3",
        ),
        (lambda p: [(c, 4) for c, _ in p], ValueError, "cached_pos 4 is outside the 3 positions that are cached"),
        (lambda p: [(c, -1) for c, _ in p], ValueError, "cached_pos -1 is outside the 3 positions"),
        (lambda p: [(c, 2.0) for c, _ in p], TypeError, "cached_pos must be an int or a .batch,. tensor, got float"),
        (lambda p: [(c, torch.tensor([3])) for c, _ in p], ValueError, r"int64 tensor of shape \(2,\)"),
        (
            lambda p: [(c, torch.tensor([3, 3]).int()) for c, _ in p],
            ValueError,
            r"int64 tensor .* got torch.int32 \(2,\)",
        ),
        (lambda p: [(c, torch.tensor([3, 3]).to("meta")) for c, _ in p], ValueError, r"on cpu, got .* on meta"),
        (lambda p: [(c, torch.tensor([3, 4])) for c, _ in p], ValueError, "cached_pos 4 is outside the 3 positions"),
        (lambda p: [(c, torch.tensor([0, 4])) for c, _ in p], ValueError, "cached_pos 4 is outside the 3 positions"),
        (lambda p: [(c, torch.tensor([-1, 3])) for c, _ in p], ValueError, "cached_pos -1 is outside the 3 positions"),
        (
            lambda p: [({n: kv[:1] for n, kv in c.items()}, q) for c, q in p],
            ValueError,
            r"layer 0 has \(batch, kv_heads, head_size\) = \(1, 2, 2\) and this call needs \(2, 2, 2\)",
        ),
        (
            lambda p: [({n: kv[..., :1] for n, kv in c.items()}, q) for c, q in p],
            ValueError,
            "belongs to another batch or configuration",
        ),
        (
            lambda p: [({"k": c["k"], "v": c["v"][:, :, :2]}, q) for c, q in p],
            ValueError,
            "'k' and 'v' of a layer's cache must both be",
        ),
        (
            lambda p: [({n: kv.double() for n, kv in c.items()}, q) for c, q in p],
            ValueError,
            "the cache holds torch.float64 and the new keys are torch.float32",
        ),
        (
            lambda p: [({n: kv.to("meta") for n, kv in c.items()}, q) for c, q in p],
            ValueError,
            "the cache of layer 0 is on meta and input_ids on cpu",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    model: DIYForCausalLM, past: PastKeyValues, change: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model(NEXT, past_key_values=change(past), use_cache=True)


def test_past_and_new_beyond_max_seq_len_are_refused(model: DIYForCausalLM) -> None:
    _, past = model(torch.ones(1, 199, dtype=torch.int64), use_cache=True)
    with pytest.raises(ValueError, match=r"201 positions \(199 cached, 2 new\) are more than max_seq_len=200"):
        model(torch.ones(1, 2, dtype=torch.int64), past_key_values=past, use_cache=True)


def test_padding_may_reach_beyond_max_seq_len(model: DIYForCausalLM) -> None:
    """A row alone and the same row padded in a batch are accepted or refused alike."""
    ids = torch.ones(1, 198, dtype=torch.int64)
    _, past = model(ids, use_cache=True)
    padded = torch.tensor([[1, 2, 0, 0]])
    logits, past = model(padded, seq_lengths=torch.tensor([2]), past_key_values=past, use_cache=True)
    full = model(torch.cat((ids, padded[:, :2]), dim=1))
    torch.testing.assert_close(logits[:, :2], full[:, -2:])
    assert past[0][1] == 200


def test_rows_of_several_lengths_go_back_to_one_position() -> None:
    model = (
        DIYForCausalLM(DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=16))
        .double()
        .eval()
    )
    ids = torch.arange(18).view(2, 9) % 16
    _, past = model(ids[:, :8], seq_lengths=torch.tensor([8, 5]), use_cache=True)
    logits = model(ids[:, 8:], past_key_values=[(cached, 4) for cached, _ in past])
    assert_near(logits[:, -1], model(torch.cat((ids[:, :4], ids[:, 8:]), 1))[:, -1])


def test_keys_and_values_that_do_not_go_together_are_refused() -> None:
    model = DIYForCausalLM(DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=16)).eval()
    _, past = model(torch.tensor([[1, 2]]), use_cache=True)
    keys, values = past[0][0]["k"], past[0][0]["v"]
    with pytest.raises(ValueError, match=r"one dtype and device, got torch.float32 on cpu and torch.float64 on cpu"):
        model(torch.tensor([[3]]), past_key_values=[({"k": keys, "v": values.double()}, 2)])
    with pytest.raises(TypeError, match="'v' of a layer's cache must be a tensor, got int"):
        model(torch.tensor([[3]]), past_key_values=[({"k": keys, "v": 1}, 2)])
