"""Every property can fail: each is broken by at least one small change to our model, and passes without it.

``RUNS`` calls each property once on a fixed model; ``MUTATIONS`` names a bug (with its slug in the catalogue of real
bugs, where it has one), the change that brings it about, and the properties that must then raise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import find, settings
from torch import Tensor, nn

import diymodel.cache
import diymodel.loss
import diymodel.model
from diymodel import DIYConfig, DIYForCausalLM
from diymodel.cache import LayerCache, Span
from diymodel.model import MLP, DIYModel, ModelBlock, RMSNorm, RotaryEmbedding
from diymodel.verify.reference import logits_of_row
from tests.oracles import oracle_num_parameters
from tests.properties import causality, decode, generation, gradients, loss, modes, padding, shapes, state
from tests.properties.strategies import Case, cases
from tests.properties.test_state import TIED

generate_module = importlib.import_module("diymodel.generate")  # "import … as" may find the function of that name

CONFIG = DIYConfig(
    vocab_size=11,
    num_layers=2,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=16,
    dropout=0.5,
    intermediate_size=6,
)
CASE = Case(CONFIG, seed=5, sharpness=1, tokens=((1, 2, 3, 4, 5, 6), (7, 6, 5, 8, 9, 1), (3, 9, 2, 7, 4, 8)))
IDS = CASE.input_ids
OTHER_IDS = (IDS + 3) % CONFIG.vocab_size
LENGTHS = torch.tensor([2, 6, 3])
FEEDS = [[[1, 2], [3, 4, 5]], [[6], [7]], [[8, 9, 10], [1]]]

LABELS = IDS.where(torch.arange(6) != 3, -100)
IGNORED = torch.full_like(IDS, -100)
LOGITS = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def variant(**changes: Any) -> DIYForCausalLM:
    """The model with other config fields."""
    return replace(CASE, config=replace(CONFIG, **changes)).model()


def objective(model: nn.Module) -> Tensor:
    return diymodel.loss.next_token_loss(model(IDS), IDS)


def oracle() -> Tensor:
    weights = CASE.model().state_dict()
    return torch.tensor([logits_of_row(CONFIG, weights, row) for row in CASE.tokens], dtype=torch.float64)


def embedding_gradient_run() -> None:
    model = CASE.model()
    few_ids = IDS[:1]  # so that some tokens of the vocabulary are absent

    def few(model: nn.Module) -> Tensor:
        return diymodel.loss.next_token_loss(model(few_ids), few_ids)

    gradients.absent_tokens_get_no_gradient(model, few, model.model.embed_tokens.weight, few_ids)


def nan_run() -> None:
    model = CASE.model()
    padding.nan_at_the_padding_does_not_leak(model, model.model.embed_tokens.weight, IDS, LENGTHS, 10)


def generate(*args: Any, **settings: Any) -> Tensor:
    """Looked up at each call, so that a mutation is seen."""
    return generate_module.generate(*args, **settings)


def next_token_loss(*args: Any, **settings: Any) -> Tensor:
    return diymodel.loss.next_token_loss(*args, **settings)


def eos_run() -> None:
    """With a token that the first row generates before the others."""
    eos = int(generation.greedy_loop(CASE.model(), IDS[:1, : LENGTHS[0]], 2)[0, -1])
    generation.ragged_rows_equal_rows_alone_in_generation(generate, CASE.model(), IDS, LENGTHS, 5, eos, padding=10)


def loss_run() -> None:
    for labels in (LABELS, IGNORED):
        loss.value_and_gradient_equal_the_oracle(next_token_loss, LOGITS, labels, -100)


def greedy_run() -> None:
    generation.greedy_equals_the_loop(generate, CASE.model(), IDS, 4)
    generation.greedy_equals_the_loop(generate, CASE.model(), IDS, 4, temperature=1.0, top_p=1e-9, seed=0)


def left_as_it_was_run() -> None:
    for fails in (False, True):
        model = CASE.model().train()
        model.model.layers[0].eval()
        generation.everything_is_left_as_it_was(generate, model, IDS.clone(), 4, fails)


RUNS: dict[Callable[..., None], Callable[[], None]] = {
    shapes.logits_are_well_formed: lambda: shapes.logits_are_well_formed(CASE.model(), IDS, 11, torch.float64),
    shapes.logits_equal: lambda: shapes.logits_equal(CASE.model(), IDS, oracle()),
    shapes.memory_layout_does_not_matter: lambda: shapes.memory_layout_does_not_matter(CASE.model(), IDS),
    shapes.inputs_are_left_alone: lambda: shapes.inputs_are_left_alone(CASE.model(), IDS.clone(), LENGTHS.clone()),
    shapes.equal_calls_are_equal: lambda: shapes.equal_calls_are_equal(CASE.model(), IDS, OTHER_IDS),
    shapes.row_alone_equals_row_in_batch: lambda: shapes.row_alone_equals_row_in_batch(CASE.model(), IDS),
    shapes.permuting_rows_permutes_logits: lambda: shapes.permuting_rows_permutes_logits(
        CASE.model(), IDS, torch.tensor([2, 0, 1])
    ),
    shapes.kept_logits_equal_the_last: lambda: shapes.kept_logits_equal_the_last(CASE.model(), IDS, 2, LENGTHS),
    causality.prefix_unchanged_by_later_edit: lambda: causality.prefix_unchanged_by_later_edit(
        CASE.model(), IDS, 3, OTHER_IDS
    ),
    causality.prefix_unchanged_by_truncation: lambda: causality.prefix_unchanged_by_truncation(CASE.model(), IDS, 3),
    causality.prefix_unchanged_by_later_edit_through_cache: lambda: (
        causality.prefix_unchanged_by_later_edit_through_cache(CASE.model(), IDS, 2, 4, OTHER_IDS)
    ),
    causality.prefix_unchanged_by_later_edit_in_training: lambda: causality.prefix_unchanged_by_later_edit_in_training(
        CASE.model(), IDS, 3, OTHER_IDS, seed=0
    ),
    causality.no_gradient_from_later_tokens: lambda: causality.no_gradient_from_later_tokens(
        (model := CASE.model()), model.model.embed_tokens, IDS, 3
    ),
    causality.position_sees_itself: lambda: causality.position_sees_itself(CASE.model(), IDS, 3, OTHER_IDS),
    causality.last_position_sees_the_first: lambda: causality.last_position_sees_the_first(
        CASE.model(), IDS, OTHER_IDS
    ),
    causality.order_of_the_past_matters: lambda: causality.order_of_the_past_matters(variant(num_layers=1), IDS),
    decode.cached_equals_uncached: lambda: decode.cached_equals_uncached(CASE.model(), IDS, [2, 3, 1]),
    decode.ragged_rows_equal_rows_alone: lambda: decode.ragged_rows_equal_rows_alone(CASE.model(), FEEDS, padding=0),
    decode.branches_are_independent: lambda: decode.branches_are_independent(
        CASE.model(), IDS, OTHER_IDS[:, :2], OTHER_IDS[:, 2:4]
    ),
    decode.unrelated_call_changes_nothing: lambda: decode.unrelated_call_changes_nothing(
        CASE.model(), IDS, OTHER_IDS[:, :2], OTHER_IDS
    ),
    decode.chosen_rows_continue: lambda: decode.chosen_rows_continue(
        CASE.model(), IDS, torch.tensor([2, 0, 2]), OTHER_IDS[:, :2]
    ),
    decode.rollback_continues_the_prefix: lambda: decode.rollback_continues_the_prefix(
        CASE.model(), IDS, 3, OTHER_IDS[:, :2]
    ),
    decode.cache_keeps_no_graph: lambda: decode.cache_keeps_no_graph(CASE.model(), IDS),
    decode.appending_is_in_place: lambda: decode.appending_is_in_place(CASE.model(), torch.arange(11)[None]),
    padding.padding_changes_no_real_logit: lambda: padding.padding_changes_no_real_logit(CASE.model(), IDS, LENGTHS),
    padding.padding_content_is_irrelevant: lambda: padding.padding_content_is_irrelevant(
        CASE.model(), IDS, LENGTHS, OTHER_IDS
    ),
    padding.nan_at_the_padding_does_not_leak: nan_run,
    padding.padded_rows_stay_finite: lambda: padding.padded_rows_stay_finite(
        CASE.model(), IDS, torch.tensor([0, 6, 3])
    ),
    padding.mask_and_lengths_agree: lambda: padding.mask_and_lengths_agree(CASE.model(), IDS, LENGTHS),
    padding.wrong_mask_is_refused: lambda: padding.wrong_mask_is_refused(
        CASE.model(), IDS, torch.tensor([[0, 0, 1, 1, 1, 1]] * 3)
    ),
    loss.value_and_gradient_equal_the_oracle: loss_run,
    loss.micro_batches_add_up: lambda: loss.micro_batches_add_up(next_token_loss, LOGITS, LABELS, -100, [1, 2]),
    loss.first_label_is_irrelevant: lambda: loss.first_label_is_irrelevant(next_token_loss, LOGITS, LABELS, OTHER_IDS),
    modes.dropout_is_on_in_training: lambda: modes.dropout_is_on_in_training(CASE.model(), IDS, seed=0),
    modes.dropout_is_off_in_eval: lambda: modes.dropout_is_off_in_eval(CASE.model(), variant(dropout=0.0), IDS),
    modes.modes_agree_without_dropout: lambda: modes.modes_agree_without_dropout(variant(dropout=0.0), IDS),
    modes.mode_reaches_every_submodule: lambda: modes.mode_reaches_every_submodule(CASE.model()),
    modes.cache_is_refused_in_training: lambda: modes.cache_is_refused_in_training(CASE.model(), IDS),
    gradients.every_parameter_gets_a_gradient: lambda: gradients.every_parameter_gets_a_gradient(
        CASE.model(), objective
    ),
    gradients.absent_tokens_get_no_gradient: embedding_gradient_run,
    gradients.small_step_lowers_the_loss: lambda: gradients.small_step_lowers_the_loss(CASE.model(), objective),
    gradients.gradient_equals_finite_differences: lambda: gradients.gradient_equals_finite_differences(
        CASE.model(), objective, seed=0
    ),
    state.round_trip_is_exact: lambda: state.round_trip_is_exact(CASE.model(), replace(CASE, seed=6).model(), IDS),
    state.load_is_strict: lambda: state.load_is_strict(CASE.model(), "model.norm.weight"),
    state.tie_survives: lambda: state.tie_survives(
        variant(tie_word_embeddings=True), TIED, lambda model: model.to("meta").to_empty(device="cpu")
    ),
    state.untied_head_is_refused: lambda: state.untied_head_is_refused(variant(tie_word_embeddings=True), TIED),
    state.number_of_parameters_is: lambda: state.number_of_parameters_is(CASE.model(), oracle_num_parameters(CONFIG)),
    state.depth_adds_parameters: lambda: state.depth_adds_parameters(lambda depth: variant(num_layers=depth), 1),
    state.deepcopy_is_independent: lambda: state.deepcopy_is_independent(CASE.model(), IDS),
    generation.greedy_equals_the_loop: greedy_run,
    generation.cache_does_not_change_the_draws: lambda: generation.cache_does_not_change_the_draws(
        generate, CASE.model(), IDS, 6, seed=0, temperature=1.0
    ),
    generation.seeds_draw_different_tokens: lambda: generation.seeds_draw_different_tokens(
        generate, CASE.model(), IDS, 4
    ),
    generation.ragged_rows_equal_rows_alone_in_generation: eos_run,
    generation.wide_top_k_changes_nothing: lambda: generation.wide_top_k_changes_nothing(
        generate, CASE.model(), IDS, 8, seed=0, top_k=11
    ),
    generation.everything_is_left_as_it_was: left_as_it_was_run,
    generation.overlong_is_refused: lambda: generation.overlong_is_refused(
        generate, CASE.model(), IDS, 11, "max_seq_len"
    ),
}


def around(owner: Any, name: str, change: Callable[..., Any]) -> AbstractContextManager[Any]:
    """``owner.name(…)`` becomes ``change(original, …)``."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def attention(change: Callable[[Tensor, Tensor, dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[Any]:
    """Attention with the keyword arguments in ``change(query, key, keywords)`` changed."""
    return around(
        F, "scaled_dot_product_attention", lambda sdpa, q, k, v, **kw: sdpa(q, k, v, **{**kw, **change(q, k, kw)})
    )


def visible(q: Tensor, k: Tensor, ahead: int = 0) -> Tensor:
    """Which keys a query may look at, (T, S), if it may look ``ahead`` positions ahead."""
    T, S = q.shape[2], k.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T + ahead)


def hidden_as(change: Callable[[nn.Module, Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Every RMSNorm's input goes through ``change(module, hidden)`` first."""
    return around(RMSNorm, "forward", lambda forward, self, hidden: forward(self, change(self, hidden)))


def logits_as(change: Callable[[DIYForCausalLM, Tensor], Any]) -> AbstractContextManager[Any]:
    """Uncached logits go through ``change(model, logits)``."""

    def forward(original: Callable[..., Any], self: DIYForCausalLM, ids: Tensor, **kw: Any) -> Any:
        output = original(self, ids, **kw)
        return output if isinstance(output, tuple) else change(self, output)

    return around(DIYForCausalLM, "forward", forward)


def after_init(change: Callable[[DIYModel], object]) -> AbstractContextManager[Any]:
    """A backbone is changed once it is built."""
    return around(DIYModel, "__init__", lambda init, self, config: (init(self, config), change(self))[0])


def rotate_cached_keys(append: Callable[..., Any], past: Any, keys: Tensor, values: Tensor, *rest: Any) -> Any:
    if past is not None:
        cached, position = past
        span = Span.after(0, 0, cached["k"].shape[2], None)
        cos, sin = RotaryEmbedding(keys.shape[-1], CONFIG.rope_theta)(span, keys)
        past = {"k": diymodel.model.rotate(cached["k"], cos, sin), "v": cached["v"]}, position
    return append(past, keys, values, *rest)


def advance_positions_after_the_first_layer(backbone: DIYModel) -> None:
    def advance(_block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, step, past = args
        if past is not None:
            span = step.cached._replace(start=step.cached.start + 1, filled=step.cached.filled + 1)
            step = step._replace(**dict(zip(("cos", "sin"), backbone.rotary(span, hidden), strict=True)))
        return hidden, step, past

    for block in backbone.layers[1:]:
        block.register_forward_pre_hook(advance)


def count_calls(backbone: DIYModel) -> None:
    """State that survives: each call makes the next one's logits a little larger."""

    def grow(_backbone: nn.Module, _args: object) -> None:
        backbone.norm.weight.data *= 1.001

    backbone.register_forward_pre_hook(grow)


def interleaved(_rotate: Callable[..., Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary pairs (0, 1), (2, 3) … in place of (0, D/2), (1, D/2 + 1) …"""
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., half:]
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


def tiled_heads(sdpa: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
    """Query head h reads key head h mod K in place of h // (H / K)."""
    times = (1, q.shape[1] // k.shape[1], 1, 1)
    return sdpa(q, k.repeat(times), v.repeat(times), **{**kw, "enable_gqa": False})


@contextlib.contextmanager
def without_finally(eval_mode: object, model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    yield
    for module in training:
        module.training = True


def stop_when_any_row_is_finished(generate: Callable[..., Tensor], *args: Any, **settings: Any) -> Tensor:
    with mock.patch.object(Tensor, "all", Tensor.any):
        return generate(*args, **settings)


def changed_loss(change: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    return around(diymodel.loss, "next_token_loss", change)


def changed_generate(change: Callable[..., Any]) -> AbstractContextManager[Any]:
    return around(generate_module, "generate", change)


def changed_choose(change: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    return around(generate_module, "choose", change)


Mutation = tuple[str, Callable[[], AbstractContextManager[Any]], tuple[Callable[..., None], ...]]

MUTATIONS: list[Mutation] = [
    # Masks and causality
    (
        "bidirectional-mask",
        lambda: attention(lambda q, k, kw: {"attn_mask": None, "is_causal": False}),
        (
            causality.prefix_unchanged_by_later_edit,
            causality.prefix_unchanged_by_truncation,
            causality.no_gradient_from_later_tokens,
            padding.padding_changes_no_real_logit,
        ),
    ),
    (
        "mask-sees-next-token",
        lambda: attention(lambda q, k, kw: {"attn_mask": visible(q, k, ahead=1), "is_causal": False}),
        (causality.prefix_unchanged_by_later_edit, decode.cached_equals_uncached),
    ),
    (
        "mask-value-too-small",
        lambda: attention(
            lambda q, k, kw: {"attn_mask": torch.where(visible(q, k), 0.0, -8.0).to(q), "is_causal": False}
        ),
        (causality.prefix_unchanged_by_later_edit,),
    ),
    (
        "mask-dropped-with-dropout",
        lambda: attention(lambda q, k, kw: {"is_causal": kw["is_causal"] and kw["dropout_p"] == 0}),
        (causality.prefix_unchanged_by_later_edit_in_training,),
    ),
    (
        "chunk-mask-top-left",
        lambda: attention(lambda q, k, kw: {"attn_mask": None, "is_causal": q.shape[2] > 1}),
        (decode.cached_equals_uncached, decode.branches_are_independent),
    ),
    (
        "chunk-unmasked",
        lambda: attention(lambda q, k, kw: {"attn_mask": None}),
        (causality.prefix_unchanged_by_later_edit_through_cache, decode.cached_equals_uncached),
    ),
    (
        "statistic-over-sequence",
        lambda: hidden_as(lambda norm, hidden: hidden - hidden.mean(1, keepdim=True)),
        (causality.prefix_unchanged_by_later_edit, causality.prefix_unchanged_by_truncation),
    ),
    (
        "no attention at all",
        lambda: around(F, "scaled_dot_product_attention", lambda sdpa, q, k, v, **kw: torch.zeros_like(q)),
        (causality.last_position_sees_the_first, gradients.every_parameter_gets_a_gradient),
    ),
    (
        "input one token late",
        lambda: around(DIYForCausalLM, "forward", lambda f, self, ids, **kw: f(self, ids.roll(1, 1), **kw)),
        (causality.position_sees_itself,),
    ),
    # Positions
    (
        "position-restarts-in-decode",
        lambda: around(RotaryEmbedding, "forward", lambda f, self, span, like: f(self, span._replace(start=0), like)),
        (decode.cached_equals_uncached, decode.ragged_rows_equal_rows_alone),
    ),
    (
        "position-advances-per-layer",
        lambda: after_init(advance_positions_after_the_first_layer),
        (decode.cached_equals_uncached,),
    ),
    (
        "cached-keys-rotated-again",
        lambda: around(diymodel.model, "append", rotate_cached_keys),
        (decode.cached_equals_uncached,),
    ),
    (
        "position-from-kept-length",
        lambda: around(
            DIYModel,
            "forward",
            lambda f, self, ids, lengths, past, use: f(
                self, ids, lengths, past and [(cached, cached["k"].shape[2]) for cached, _ in past], use
            ),
        ),
        (decode.rollback_continues_the_prefix,),
    ),
    (
        "no-positions",
        lambda: around(diymodel.model, "rotate", lambda rotate, x, cos, sin: x),
        (causality.order_of_the_past_matters,),
    ),
    (
        "rope-low-precision",
        lambda: around(
            RotaryEmbedding,
            "_make_table",
            lambda make, self, length, like: make(self, length, like).bfloat16().to(like),
        ),
        (shapes.logits_equal,),
    ),
    ("rope-pairing-convention", lambda: around(diymodel.model, "rotate", interleaved), (shapes.logits_equal,)),
    # The cache
    (
        "cache-mutated-in-place",
        lambda: around(LayerCache, "tip", lambda tip, self, position: self._buffer),
        (decode.branches_are_independent, decode.rollback_continues_the_prefix),
    ),
    (
        "cache copied at each step",
        lambda: around(LayerCache, "tip", lambda tip, self, position: None),
        (decode.appending_is_in_place,),
    ),
    (
        "cache-rows-shared",
        lambda: around(
            diymodel.model, "append", lambda append, past, k, v, *rest: append(past, k[:1].expand_as(k), v, *rest)
        ),
        (decode.cached_equals_uncached, decode.chosen_rows_continue),
    ),
    (
        "cache-drops-oldest",
        lambda: attention(
            lambda q, k, kw: (
                {"attn_mask": visible(q, k) & (torch.arange(k.shape[2]) > 0)} if k.shape[2] > q.shape[2] else {}
            )
        ),
        (decode.cached_equals_uncached, decode.chosen_rows_continue),
    ),
    (
        "cache-keeps-graph",
        lambda: mock.patch.object(torch, "no_grad", contextlib.nullcontext),
        (decode.cache_keeps_no_graph,),
    ),
    (
        "state-survives-calls",
        lambda: after_init(count_calls),
        (shapes.equal_calls_are_equal, decode.unrelated_call_changes_nothing),
    ),
    # Batch, heads, numerics
    (
        "statistic-over-batch",
        lambda: hidden_as(lambda norm, hidden: hidden - hidden.mean(0, keepdim=True) / 2),
        (shapes.row_alone_equals_row_in_batch,),
    ),
    (
        "row number in the logits",
        lambda: logits_as(lambda model, logits: logits + torch.arange(len(logits))[:, None, None]),
        (shapes.permuting_rows_permutes_logits, shapes.row_alone_equals_row_in_batch),
    ),
    (
        "attention-scale-wrong",
        lambda: attention(lambda q, k, kw: {"scale": 1.0}),
        (shapes.logits_equal,),
    ),
    ("gqa-head-order", lambda: around(F, "scaled_dot_product_attention", tiled_heads), (shapes.logits_equal,)),
    (
        "logits in another dtype",
        lambda: logits_as(lambda model, logits: logits.float()),
        (shapes.logits_are_well_formed,),
    ),
    (
        "strides ignored",
        lambda: around(
            DIYForCausalLM,
            "forward",
            lambda f, self, ids, **kw: f(self, ids.as_strided(ids.shape, (ids.shape[1], 1)), **kw),
        ),
        (shapes.memory_layout_does_not_matter,),
    ),
    (
        "inputs-written-in-place",
        lambda: around(
            DIYModel,
            "forward",
            lambda f, self, ids, lengths, *rest: f(self, ids.copy_(ids.clamp(max=8)), lengths, *rest),
        ),
        (shapes.inputs_are_left_alone,),
    ),
    # Padding
    (
        "lengths ignored",
        lambda: around(DIYModel, "forward", lambda f, self, ids, lengths, *rest: f(self, ids, None, *rest)),
        (padding.padding_content_is_irrelevant, decode.ragged_rows_equal_rows_alone),
    ),
    (
        "masked-nan-leaks",
        lambda: mock.patch.object(Tensor, "masked_fill", lambda self, mask, value: self),
        (padding.nan_at_the_padding_does_not_leak,),
    ),
    (
        "masked-row-nan",
        lambda: around(
            DIYForCausalLM,
            "forward",
            lambda f, self, ids, seq_lengths: f(self, ids, seq_lengths=seq_lengths) / (seq_lengths > 0)[:, None, None],
        ),
        (padding.padded_rows_stay_finite,),
    ),
    (
        "mask counted one short",
        lambda: around(diymodel.model, "seq_lengths_of", lambda of, mask, ids: of(mask, ids) - 1),
        (padding.mask_and_lengths_agree,),
    ),
    (
        "mask summed unread",
        lambda: around(diymodel.model, "seq_lengths_of", lambda of, mask, ids: mask.sum(1)),
        (padding.wrong_mask_is_refused,),
    ),
    # The loss
    (
        "labels-shifted-twice",
        lambda: changed_loss(lambda loss, logits, labels, **kw: loss(logits[:, :-1], labels[:, 1:], **kw)),
        (loss.value_and_gradient_equal_the_oracle,),
    ),
    (
        "labels-not-shifted",
        lambda: changed_loss(lambda loss, logits, labels, **kw: loss(logits, labels.roll(1, 1), **kw)),
        (loss.value_and_gradient_equal_the_oracle, loss.first_label_is_irrelevant),
    ),
    (
        "labels-flattened-before-shift",
        lambda: changed_loss(
            lambda loss, logits, labels, **kw: loss(logits.flatten(0, 1)[None], labels.flatten()[None], **kw)
        ),
        (loss.value_and_gradient_equal_the_oracle, loss.first_label_is_irrelevant),
    ),
    (
        "ignore-index-not-honoured",
        lambda: changed_loss(lambda loss, logits, labels, **kw: loss(logits, labels.clamp(min=0), **kw)),
        (loss.value_and_gradient_equal_the_oracle,),
    ),
    (
        "loss-wrong-denominator",
        lambda: around(diymodel.loss, "num_scored", lambda num, labels, ignore: torch.tensor(labels[:, 1:].numel())),
        (loss.value_and_gradient_equal_the_oracle, loss.micro_batches_add_up),
    ),
    (
        "all-ignored-loss-nan",
        lambda: changed_loss(
            lambda loss, logits, labels, **kw: loss(logits, labels, **kw) * (live := (labels >= 0).sum()) / live
        ),
        (loss.value_and_gradient_equal_the_oracle,),
    ),
    (
        "accumulation-mean-of-means",
        lambda: changed_loss(
            lambda loss, logits, labels, ignore_index, reduction="": loss(logits, labels, ignore_index)
        ),
        (loss.micro_batches_add_up,),
    ),
    # Modes
    (
        "dropout-active-in-eval",
        lambda: attention(lambda q, k, kw: {"dropout_p": CONFIG.dropout}),
        (modes.dropout_is_off_in_eval, shapes.equal_calls_are_equal),
    ),
    (
        "mode-flag-copied",
        lambda: around(ModelBlock, "_drop", lambda drop, self, update: F.dropout(update, self.dropout)),
        (modes.dropout_is_off_in_eval,),
    ),
    (
        "dropout-never-active",
        lambda: around(DIYForCausalLM, "__init__", lambda init, self, config: init(self, replace(config, dropout=0.0))),
        (modes.dropout_is_on_in_training,),
    ),
    (
        "training-branch-differs",
        lambda: around(RMSNorm, "forward", lambda f, self, hidden: f(self, hidden) * (1.01 if self.training else 1)),
        (modes.modes_agree_without_dropout,),
    ),
    (
        "train() stops at the blocks",
        lambda: around(ModelBlock, "train", lambda train, self, mode: self),
        (modes.mode_reaches_every_submodule,),
    ),
    (
        "cache built in training",
        lambda: around(DIYModel, "forward", lambda f, self, *args: f(self.eval(), *args)),
        (modes.cache_is_refused_in_training,),
    ),
    # Gradients
    (
        "gradient-detached",
        lambda: around(MLP, "forward", lambda f, self, hidden: f(self, hidden).detach()),
        (gradients.every_parameter_gets_a_gradient, gradients.gradient_equals_finite_differences),
    ),
    (
        "gradient with the wrong sign",
        lambda: logits_as(lambda model, logits: 2 * logits.detach() - logits),
        (gradients.small_step_lowers_the_loss, gradients.gradient_equals_finite_differences),
    ),
    (
        "statistic over the vocabulary",
        lambda: logits_as(lambda model, logits: logits * (1 + model.model.embed_tokens.weight.mean())),
        (gradients.absent_tokens_get_no_gradient,),
    ),
    # State
    (
        "tie-lost",
        lambda: mock.patch.object(DIYForCausalLM, "_apply", nn.Module._apply),
        (state.tie_survives,),
    ),
    (
        "untied head overwritten in silence",
        lambda: mock.patch.object(DIYForCausalLM, "load_state_dict", nn.Module.load_state_dict),
        (state.untied_head_is_refused,),
    ),
    (
        "lenient-load",
        lambda: around(DIYForCausalLM, "load_state_dict", lambda load, self, values: load(self, values, strict=False)),
        (state.load_is_strict,),
    ),
    (
        "state-outside-checkpoint",
        lambda: around(
            RotaryEmbedding,
            "__init__",
            lambda init, self, size, theta: init(self, size, theta * (1 + torch.rand(1).item())),
        ),
        (state.round_trip_is_exact,),
    ),
    (
        "block-shared",
        lambda: after_init(
            lambda model: setattr(model, "layers", nn.ModuleList([model.layers[0]] * len(model.layers)))
        ),
        (state.depth_adds_parameters, state.number_of_parameters_is),
    ),
    (
        "parameters-unregistered",
        lambda: after_init(lambda model: model.norm.__dict__.update(weight=model.norm._parameters.pop("weight"))),
        (state.number_of_parameters_is,),
    ),
    (
        "shallow copy",
        lambda: mock.patch.object(DIYForCausalLM, "__deepcopy__", lambda self, memo: copy.copy(self), create=True),
        (state.deepcopy_is_independent,),
    ),
    # Generation
    (
        "eos-not-per-row: any row stops all",
        lambda: changed_generate(stop_when_any_row_is_finished),
        (generation.ragged_rows_equal_rows_alone_in_generation,),
    ),
    (
        "eos-not-per-row: finished rows go on",
        lambda: changed_generate(lambda generate, *args, eos_token_id=None, **kw: generate(*args, **kw)),
        (generation.ragged_rows_equal_rows_alone_in_generation,),
    ),
    (
        "continues-from-pad",
        lambda: around(
            diymodel.model, "_last_positions", lambda last, hidden, lengths, count: last(hidden, None, count)
        ),
        (generation.ragged_rows_equal_rows_alone_in_generation, shapes.kept_logits_equal_the_last),
    ),
    (
        "temperature-zero",
        lambda: changed_choose(lambda choose, logits, temperature, *rest: choose(logits, temperature or 9.0, *rest)),
        (generation.greedy_equals_the_loop,),
    ),
    (
        "top-k-edge",
        lambda: changed_choose(
            lambda choose, logits, t, k, *rest: choose(logits, t, k and min(k, logits.shape[-1] - 8), *rest)
        ),
        (generation.wide_top_k_changes_nothing,),
    ),
    (
        "top-p-edge",
        lambda: changed_choose(
            lambda choose, logits, t, k, p, *rest: choose(0 * logits if p == 1e-9 else logits, t, k, None, *rest)
        ),
        (generation.greedy_equals_the_loop,),
    ),
    (
        "seed ignored",
        lambda: changed_generate(lambda generate, *args, seed=None, **kw: generate(*args, **kw)),
        (generation.cache_does_not_change_the_draws,),
    ),
    (
        "seed fixed",
        lambda: changed_generate(lambda generate, *args, seed=None, **kw: generate(*args, seed=0, **kw)),
        (generation.seeds_draw_different_tokens,),
    ),
    (
        "mode-not-restored",
        lambda: around(generate_module, "eval_mode", lambda mode, model: contextlib.nullcontext(model.eval())),
        (generation.everything_is_left_as_it_was,),
    ),
    (
        "mode restored for all modules alike",
        lambda: changed_generate(lambda generate, model, *args, **kw: (generate(model, *args, **kw), model.train())[0]),
        (generation.everything_is_left_as_it_was,),
    ),
    (
        "mode restored on success only",
        lambda: around(generate_module, "eval_mode", without_finally),
        (generation.everything_is_left_as_it_was,),
    ),
    (
        "global random state consumed",
        lambda: changed_generate(lambda generate, *args, **kw: (torch.rand(1), generate(*args, **kw))[1]),
        (generation.everything_is_left_as_it_was,),
    ),
    (
        "prompt written in place",
        lambda: changed_generate(lambda generate, model, ids, *args, **kw: generate(model, ids.sub_(1), *args, **kw)),
        (generation.everything_is_left_as_it_was,),
    ),
    (
        "generation-overflow",
        lambda: mock.patch.object(generate_module, "_check"),
        (generation.overlong_is_refused,),
    ),
]

KILLS = [(slug, mutation, prop) for slug, mutation, props in MUTATIONS for prop in props]


@pytest.mark.parametrize("prop", RUNS, ids=lambda prop: prop.__name__)
def test_the_property_holds_without_a_mutation(prop: Callable[..., None]) -> None:
    RUNS[prop]()


@pytest.mark.parametrize(
    ("mutation", "prop"), [kill[1:] for kill in KILLS], ids=[f"{slug}-{prop.__name__}" for slug, _, prop in KILLS]
)
def test_the_mutation_is_killed(mutation: Callable[[], AbstractContextManager[Any]], prop: Callable[..., None]) -> None:
    with mutation(), torch.random.fork_rng(), pytest.raises(AssertionError, match="expected"):
        RUNS[prop]()


@pytest.mark.parametrize(
    "concern", [causality, decode, generation, gradients, loss, modes, padding, shapes, state], ids=lambda m: m.__name__
)
def test_every_property_is_killed_by_some_mutation(concern: types.ModuleType) -> None:
    """A property is a public function of its file that returns nothing."""
    properties = {
        function
        for name, function in inspect.getmembers(concern, inspect.isfunction)
        if function.__module__ == concern.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation == "None"
    }
    assert properties <= RUNS.keys()
    assert properties <= {prop for _, _, prop in KILLS}


def test_a_failure_shrinks_to_what_a_person_can_redo() -> None:
    """One layer, one head, one row of two tokens."""

    def leaks(case: Case) -> bool:
        try:
            other_ids = (case.input_ids + 1) % case.config.vocab_size
            causality.prefix_unchanged_by_later_edit(case.model(), case.input_ids, 1, other_ids)
        except AssertionError:
            return True
        return False

    with attention(lambda q, k, kw: {"attn_mask": None, "is_causal": False}):
        smallest = find(cases(min_length=2), leaks, settings=settings(max_examples=50))
    assert (smallest.config.num_layers, smallest.config.num_heads, smallest.tokens) == (1, 1, ((0, 0),))
