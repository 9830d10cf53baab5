"""Changes to our own model, one place at a time, each with who must see it.

A mutation is named by the slug of its class in the catalogue of bugs, or by words where it has none. What no check can
see, because it concerns our interface alone, one of our own tests must see.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diymodel.loss
import diymodel.model
from diymodel import DIYConfig, DIYForCausalLM
from diymodel.cache import LayerCache, Span
from diymodel.model import MLP, DIYModel, ModelBlock, RMSNorm, RotaryEmbedding
from tests import test_cache, test_generate, test_loss, test_model, test_state

generate_module = importlib.import_module("diymodel.generate")  # "import … as" may find the function of that name


@dataclass(frozen=True)
class Mutation:
    """A change to our model, and who must see it."""

    name: str
    patch: Callable[[], AbstractContextManager[Any]]
    checks: tuple[str, ...] = ()  # ids
    tests: tuple[Callable[[], None], ...] = ()  # of tests/test_<module>.py


def around(owner: Any, name: str, change: Callable[..., Any]) -> AbstractContextManager[Any]:
    """``owner.name(…)`` becomes ``change(original, …)``, with the same signature."""
    original = getattr(owner, name)

    @wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    return mock.patch.object(owner, name, changed)


def attention(change: Callable[[Tensor, Tensor, dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[Any]:
    """Attention with the keyword arguments in ``change(query, key, keywords)`` changed."""
    return around(
        F, "scaled_dot_product_attention", lambda sdpa, q, k, v, **kw: sdpa(q, k, v, **{**kw, **change(q, k, kw)})
    )


def visible(q: Tensor, k: Tensor, ahead: int = 0) -> Tensor:
    """Which keys a query may look at, (T, S), if it may look ``ahead`` positions ahead."""
    T, S = q.shape[2], k.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T + ahead)


def allowed(q: Tensor, k: Tensor, kw: dict[str, Any]) -> Tensor:
    """Which keys a query may look at, in rows that are padded as well."""
    given: Tensor | None = kw.get("attn_mask")
    return visible(q, k) if given is None else given


def attention_by_hand(sdpa: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
    """With powers of e that may overflow."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed(q, k, kw), -torch.inf).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def hidden_as(change: Callable[[RMSNorm, Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Every RMSNorm's input goes through ``change(norm, hidden)`` first."""
    return around(RMSNorm, "forward", lambda forward, self, hidden: forward(self, change(self, hidden)))


def ids_as(change: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    """Token ids go through ``change(input_ids)`` first."""
    return around(
        DIYForCausalLM, "forward", lambda forward, self, input_ids, **kw: forward(self, change(input_ids), **kw)
    )


def logits_as(change: Callable[[DIYForCausalLM, Tensor], Any]) -> AbstractContextManager[Any]:
    """Uncached logits go through ``change(model, logits)``."""

    def forward(original: Callable[..., Any], self: DIYForCausalLM, *args: Any, **kw: Any) -> Any:
        output = original(self, *args, **kw)
        return output if isinstance(output, tuple) else change(self, output)

    return around(DIYForCausalLM, "forward", forward)


def after_init(change: Callable[[DIYModel], object]) -> AbstractContextManager[Any]:
    """A backbone is changed once it is built."""
    return around(DIYModel, "__init__", lambda init, self, config: (init(self, config), change(self))[0])


def generate_as(change: Callable[..., Any]) -> AbstractContextManager[Any]:
    return around(DIYForCausalLM, "generate", change)


def choose_as(change: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    return around(generate_module, "choose", change)


def goes_on_from_the_beginning(
    generate: Callable[..., Tensor],
    model: DIYForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *args: Any,
    **kw: Any,
) -> Tensor:
    """Of a text longer than the model holds, the beginning counts."""
    for _ in range(max_new_tokens):
        new = generate(model, input_ids[:, : model.config.max_seq_len - 1], 1, *args, **kw)[:, -1:]
        input_ids = torch.cat((input_ids, new), 1)
    return input_ids


def loss_as(change: Callable[..., Tensor]) -> AbstractContextManager[Any]:
    return around(diymodel.loss, "next_token_loss", change)


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Drops nothing, in attention and elsewhere."""
    with attention(lambda q, k, kw: {"dropout_p": 0.0}), mock.patch.object(F, "dropout", lambda x, *_: x):
        yield


def attend_by_exp(_sdpa: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **kw: Any) -> Tensor:
    """Softmax by hand, over distances as well, so that what the mask hides is larger the further ahead it is."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    ahead = torch.arange(k.shape[2]) - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + ahead).exp().masked_fill(ahead > 0, 0)
    return weights / weights.sum(-1, keepdim=True) @ v


def mean_of_means_of_512(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, **kw: Any) -> Tensor:
    """Of every 512 labels; where there are no more, it is their mean."""
    if labels.numel() <= 512:
        return loss(logits, labels, **kw)
    scored, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    parts = zip(scored.split(512), wanted.split(512), strict=True)
    return torch.stack([F.cross_entropy(part, label) for part, label in parts]).mean()


@contextlib.contextmanager
def mlp_in_a_list() -> Iterator[None]:
    def init(original: Callable[..., None], self: ModelBlock, config: DIYConfig) -> None:
        original(self, config)
        self.parts = [self._modules.pop("mlp")]

    with (
        around(ModelBlock, "__init__", init),
        mock.patch.object(ModelBlock, "mlp", property(lambda self: self.parts[0])),
    ):
        yield


def rotate_cached_keys(
    put: Callable[..., Any], span: Span, past: Any, keys: Tensor, values: Tensor, max_length: int
) -> Any:
    if past is not None:
        cached, position = past
        before = Span.after(0, 0, cached["k"].shape[2], None)
        cos, sin = RotaryEmbedding(keys.shape[-1], 10000.0)(before, keys)
        past = {"k": diymodel.model.rotate(cached["k"], cos, sin), "v": cached["v"]}, position
    return put(span, past, keys, values, max_length)


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


def copy_embedding(self: DIYForCausalLM) -> None:
    if self.config.tie_word_embeddings:
        self.lm_head.weight = nn.Parameter(self.model.embed_tokens.weight.detach().clone())


@contextlib.contextmanager
def scale_in_a_buffer() -> Iterator[None]:
    """Which nothing fills again where a model is built without memory."""
    with (
        after_init(lambda backbone: backbone.register_buffer("scale", torch.ones(1), persistent=False)),
        logits_as(lambda model, logits: logits * model.model.scale),
    ):
        yield


def scale_detached(_forward: Callable[..., Tensor], self: RMSNorm, hidden: Tensor) -> Tensor:
    scale = (hidden.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()
    return hidden * scale.detach() * self.weight


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


MUTATIONS = [
    # Masks and causality
    Mutation(
        "bidirectional-mask",
        lambda: attention(lambda q, k, kw: {"attn_mask": None, "is_causal": False}),
        ("causality.edit", "causality.truncation", "causality.gradient", "padding.right_changes_nothing"),
    ),
    Mutation(
        "mask-sees-next-token",
        lambda: attention(lambda q, k, kw: {"attn_mask": visible(q, k, ahead=1), "is_causal": False}),
        ("causality.edit", "decode.cached_equals_full"),
    ),
    Mutation(
        "mask-value-too-small",
        lambda: attention(
            lambda q, k, kw: {"attn_mask": torch.where(visible(q, k), 0.0, -8.0).to(q), "is_causal": False}
        ),
        ("causality.edit",),
    ),
    Mutation(
        "mask-value-too-small: of scores below ten thousand it holds",
        lambda: attention(
            lambda q, k, kw: {"attn_mask": torch.where(allowed(q, k, kw), 0.0, -1e4).to(q), "is_causal": False}
        ),
        ("causality.large_scores",),
    ),
    Mutation(
        "softmax-without-maximum",
        lambda: around(F, "scaled_dot_product_attention", attention_by_hand),
        ("numerics.large_scores_finite",),
    ),
    Mutation(
        "mask-dropped-with-dropout",
        lambda: attention(lambda q, k, kw: {"is_causal": kw["is_causal"] and kw["dropout_p"] == 0}),
        ("causality.in_training",),
    ),
    Mutation(
        "chunk-mask-top-left",
        lambda: attention(lambda q, k, kw: {"attn_mask": None, "is_causal": q.shape[2] > 1}),
        ("decode.chunks", "decode.session"),
    ),
    Mutation(
        "chunk-unmasked",
        lambda: attention(lambda q, k, kw: {"attn_mask": None}),
        ("causality.through_cache", "decode.chunks"),
    ),
    Mutation(
        "statistic-over-sequence",
        lambda: hidden_as(lambda norm, hidden: hidden - hidden.mean(1, keepdim=True)),
        ("causality.edit", "causality.truncation"),
    ),
    Mutation(
        "no attention at all",
        lambda: around(F, "scaled_dot_product_attention", lambda sdpa, q, k, v, **kw: torch.zeros_like(q)),
        ("sensitivity.sees_itself_and_its_past", "gradients.reach_every_parameter"),
    ),
    Mutation(
        "input one token late", lambda: ids_as(lambda ids: ids.roll(1, 1)), ("sensitivity.sees_itself_and_its_past",)
    ),
    # Positions
    Mutation(
        "position-restarts-in-decode",
        lambda: around(RotaryEmbedding, "forward", lambda f, self, span, like: f(self, span._replace(start=0), like)),
        ("decode.cached_equals_full", "padding.right_with_cache"),
    ),
    Mutation(
        "position-advances-per-layer",
        lambda: after_init(advance_positions_after_the_first_layer),
        ("decode.cached_equals_full",),
    ),
    Mutation(
        "cached-keys-rotated-again",
        lambda: around(Span, "put", rotate_cached_keys),
        ("decode.cached_equals_full",),
    ),
    Mutation(
        "position-from-kept-length",
        lambda: around(
            DIYModel,
            "forward",
            lambda f, self, ids, lengths, past, use: f(
                self, ids, lengths, past and [(cached, cached["k"].shape[2]) for cached, _ in past], use
            ),
        ),
        tests=(test_cache.test_every_version_goes_on_from_any_position,),
    ),
    Mutation(
        "no-positions",
        lambda: around(diymodel.model, "rotate", lambda rotate, x, cos, sin: x),
        ("sensitivity.order_matters",),
    ),
    Mutation(
        "rope-low-precision",
        lambda: around(
            RotaryEmbedding,
            "forward",
            lambda f, self, span, like: tuple(part.bfloat16().to(like) for part in f(self, span, like)),
        ),
        ("sensitivity.shift_invariance", "reference.logits"),
    ),
    Mutation("rope-pairing-convention", lambda: around(diymodel.model, "rotate", interleaved), ("reference.logits",)),
    # The cache
    Mutation(
        "cache-mutated-in-place",
        lambda: around(LayerCache, "tip", lambda tip, self, position: self._buffer),
        ("decode.branch",),
        tests=(test_cache.test_every_version_goes_on_from_any_position,),
    ),
    Mutation(
        "cache copied at each step",
        lambda: around(LayerCache, "tip", lambda tip, self, position: None),
        tests=(test_cache.test_appending_copies_no_more_than_its_length_in_total,),
    ),
    Mutation(
        "cache-rows-shared",
        lambda: around(Span, "put", lambda put, span, past, k, *rest: put(span, past, k[:1].expand_as(k), *rest)),
        ("decode.cached_equals_full", "decode.rows_reordered"),
        tests=(test_cache.test_rows_chosen_by_hand_go_on_as_those_rows,),
    ),
    Mutation(
        "cache-drops-oldest",
        lambda: attention(
            lambda q, k, kw: (
                {"attn_mask": visible(q, k) & (torch.arange(k.shape[2]) > 0)} if k.shape[2] > q.shape[2] else {}
            )
        ),
        ("decode.cached_equals_full", "decode.rows_reordered"),
    ),
    Mutation(
        "cache-keeps-graph",
        lambda: mock.patch.object(torch, "no_grad", contextlib.nullcontext),
        tests=(
            partial(
                test_cache.test_a_cache_carries_no_graph_where_gradients_are_on,
                DIYForCausalLM(test_cache.CONFIG).eval(),
            ),
        ),
    ),
    Mutation(
        "state-survives-calls",
        lambda: after_init(count_calls),
        ("forward.deterministic", "decode.unrelated_call"),
    ),
    # Batch, heads, numerics
    Mutation(
        "statistic-over-batch",
        lambda: hidden_as(lambda norm, hidden: hidden - hidden.mean(0, keepdim=True) / 2),
        ("batch.row_alone",),
    ),
    Mutation(
        "row number in the logits",
        lambda: logits_as(lambda model, logits: logits + torch.arange(len(logits))[:, None, None]),
        ("batch.permutation", "batch.row_alone"),
    ),
    Mutation(
        "rmsnorm-overflow-half",
        lambda: mock.patch.object(diymodel.model, "HALF_TYPES", ()),
        ("numerics.large_activations_finite",),
    ),
    Mutation("attention-scale-wrong", lambda: attention(lambda q, k, kw: {"scale": 1.0}), ("reference.logits",)),
    Mutation("gqa-head-order", lambda: around(F, "scaled_dot_product_attention", tiled_heads), ("reference.logits",)),
    Mutation(
        "logits in another dtype",
        lambda: logits_as(lambda model, logits: logits.float()),
        tests=(partial(test_model.test_logits_have_the_models_dtype, torch.float64),),
    ),
    Mutation(
        "contiguous-input-assumed",
        lambda: ids_as(lambda ids: ids.as_strided(ids.shape, (ids.shape[1], 1))),
        ("forward.memory_layout",),
    ),
    Mutation(
        "inputs-written-in-place",
        lambda: ids_as(lambda ids: ids.clamp_(max=1)),
        ("forward.inputs_unchanged",),
        tests=(test_model.test_no_input_is_written_to,),
    ),
    Mutation(
        "lengths written in place",
        lambda: around(
            DIYModel,
            "forward",
            lambda f, self, ids, lengths, *rest: f(
                self, ids, None if lengths is None else lengths.clamp_(max=1), *rest
            ),
        ),
        tests=(test_model.test_no_input_is_written_to,),
    ),
    # Padding
    Mutation(
        "lengths ignored",
        lambda: around(DIYModel, "forward", lambda f, self, ids, lengths, *rest: f(self, ids, None, *rest)),
        ("padding.content_irrelevant_with_cache", "padding.right_with_cache"),
        tests=(test_cache.test_a_row_may_get_any_number_of_tokens_even_none,),
    ),
    Mutation(
        "masked-nan-leaks",
        lambda: mock.patch.object(Tensor, "masked_fill", lambda self, mask, value: self),
        ("padding.nan_contained",),
        tests=(test_cache.test_a_row_may_get_any_number_of_tokens_even_none,),
    ),
    Mutation(
        "masked-row-nan",
        lambda: around(
            DIYForCausalLM,
            "forward",
            lambda f, self, input_ids, seq_lengths=None, **kw: (
                f(self, input_ids, seq_lengths=seq_lengths, **kw)
                if seq_lengths is None or kw
                else f(self, input_ids, seq_lengths=seq_lengths) / (seq_lengths > 0)[:, None, None]
            ),
        ),
        ("padding.all_padding_finite",),
    ),
    Mutation(
        "mask counted one short",
        lambda: around(diymodel.model, "seq_lengths_of", lambda of, mask, ids: (of(mask, ids) - 1).clamp(min=0)),
        tests=(test_model.test_mask_and_lengths_say_the_same,),
    ),
    Mutation(
        "mask summed unread",
        lambda: around(diymodel.model, "seq_lengths_of", lambda of, mask, ids: mask.sum(1)),
        tests=(test_model.test_a_mask_that_is_not_right_padded_is_refused,),
    ),
    # The loss
    Mutation(
        "labels-shifted-twice",
        lambda: loss_as(lambda loss, logits, labels, **kw: loss(logits[:, :-1], labels[:, 1:], **kw)),
        ("loss.value", "loss.gradient"),
    ),
    Mutation(
        "labels-not-shifted",
        lambda: loss_as(lambda loss, logits, labels, **kw: loss(logits, labels.roll(1, 1), **kw)),
        ("loss.value", "loss.gradient"),
    ),
    Mutation(
        "labels-flattened-before-shift",
        lambda: loss_as(
            lambda loss, logits, labels, **kw: loss(logits.flatten(0, 1)[None], labels.flatten()[None], **kw)
        ),
        ("loss.value", "loss.gradient"),
    ),
    Mutation(
        "ignore-index-not-honoured",
        lambda: loss_as(lambda loss, logits, labels, **kw: loss(logits, labels.clamp(min=0), **kw)),
        ("loss.value", "loss.gradient"),
    ),
    Mutation(
        "ignore-index-not-honoured: another than -100",
        lambda: loss_as(
            lambda loss, logits, labels, ignore_index=-100, **kw: (
                loss(logits, labels.clamp(min=-100), **kw)
                if ignore_index == -100
                else loss(logits, labels.clamp(min=0), **kw)
            )
        ),
        tests=(test_loss.test_any_label_can_be_the_ignored_one,),
    ),
    Mutation(
        "softmax-without-maximum: the loss",
        lambda: loss_as(lambda loss, logits, labels, **kw: loss(logits.exp().log(), labels, **kw)),
        ("loss.large_logits",),
    ),
    Mutation(
        "loss-wrong-denominator",
        lambda: around(diymodel.loss, "num_scored", lambda num, labels, ignore: torch.tensor(labels[:, 1:].numel())),
        ("loss.value", "loss.micro_batches_add_up"),
        tests=(test_loss.test_sums_over_micro_batches_make_the_mean_of_the_whole,),
    ),
    Mutation(
        "all-ignored-loss-nan",
        lambda: loss_as(
            lambda loss, logits, labels, **kw: loss(logits, labels, **kw) * (live := (labels >= 0).sum()) / live
        ),
        ("loss.all_ignored",),
    ),
    Mutation(
        "accumulation-mean-of-means",
        lambda: loss_as(
            lambda loss, logits, labels, ignore_index=-100, reduction="": loss(logits, labels, ignore_index)
        ),
        tests=(test_loss.test_sums_over_micro_batches_make_the_mean_of_the_whole,),
    ),
    # Modes
    Mutation(
        "dropout-active-in-eval",
        lambda: attention(lambda q, k, kw: {"dropout_p": 0.5}),
        ("modes.dropout_off_in_eval", "forward.deterministic"),
    ),
    Mutation(
        "mode-flag-copied",
        lambda: around(ModelBlock, "_drop", lambda drop, self, update: F.dropout(update, self.dropout)),
        ("modes.dropout_off_in_eval",),
    ),
    Mutation("dropout-never-active", without_dropout, ("modes.dropout_active_in_training",)),
    Mutation(
        "dropout whose result nobody takes",
        lambda: around(ModelBlock, "_drop", lambda drop, self, update: (drop(self, update), update)[1]),
        ("modes.dropout_used",),
    ),
    Mutation(
        "training-branch-differs",
        lambda: around(RMSNorm, "forward", lambda f, self, hidden: f(self, hidden) * (1.01 if self.training else 1)),
        ("modes.agree_without_dropout",),
    ),
    Mutation(
        "dropout-inverted",
        lambda: around(
            ModelBlock, "_drop", lambda drop, self, update: F.dropout(update, 1 - self.dropout, self.training)
        ),
        ("modes.agree_without_dropout",),
    ),
    Mutation(
        "long rows lose the mask",
        lambda: attention(lambda q, k, kw: {"is_causal": False, "attn_mask": None} if q.shape[2] > 128 else {}),
        ("causality.long_row", "decode.long_row"),
    ),
    Mutation(
        "loss is the mean of chunks",
        lambda: loss_as(mean_of_means_of_512),
        ("loss.many_labels",),
    ),
    Mutation(
        "exp-before-mask",
        lambda: around(F, "scaled_dot_product_attention", attend_by_exp),
        ("gradients.long_row_finite",),
    ),
    Mutation(
        "train() stops at the blocks",
        lambda: around(ModelBlock, "train", lambda train, self, mode=True: self),
        ("modes.followed_at_every_depth",),
    ),
    Mutation(
        "cache built in training",
        lambda: around(DIYModel, "forward", lambda f, self, *args: f(self.eval(), *args)),
        ("modes.call_leaves_mode",),
        tests=(test_model.test_a_cache_in_training_mode_is_refused,),
    ),
    # Learning and gradients
    Mutation(
        "init-scale-wrong", lambda: mock.patch.object(diymodel.model, "INIT_STD", 1.0), ("training.initial_loss",)
    ),
    Mutation(
        "gradient-detached",
        lambda: around(MLP, "forward", lambda f, self, hidden: f(self, hidden).detach()),
        ("gradients.reach_every_parameter",),
        tests=(test_model.test_the_gradient_is_the_slope_of_the_loss,),
    ),
    Mutation(
        "norm's scale detached",
        lambda: around(RMSNorm, "forward", scale_detached),
        ("training.small_step_lowers_loss",),
        tests=(test_model.test_the_gradient_is_the_slope_of_the_loss,),
    ),
    Mutation(
        "gradient with the wrong sign",
        lambda: logits_as(lambda model, logits: 2 * logits.detach() - logits),
        ("training.small_step_lowers_loss",),
        tests=(test_model.test_the_gradient_is_the_slope_of_the_loss,),
    ),
    Mutation(
        "statistic-over-vocabulary",
        lambda: logits_as(lambda model, logits: logits * (1 + model.model.embed_tokens.weight.mean())),
        ("gradients.absent_tokens_zero",),
    ),
    # State
    Mutation(
        "tie-lost",
        lambda: mock.patch.object(DIYForCausalLM, "_apply", nn.Module._apply),
        tests=(partial(test_state.test_a_tied_weight_stays_one_parameter, test_state.through_meta),),
    ),
    Mutation(
        "tie-lost: a copy",
        lambda: mock.patch.object(DIYForCausalLM, "_tie", copy_embedding),
        ("state.tied_weights_stay_tied",),
    ),
    Mutation("buffers-uninitialised", scale_in_a_buffer, ("state.meta_device",)),
    Mutation(
        "untied head overwritten in silence",
        lambda: mock.patch.object(DIYForCausalLM, "load_state_dict", nn.Module.load_state_dict),
        tests=(test_state.test_a_head_unlike_the_embedding_is_refused,),
    ),
    Mutation(
        "lenient-load",
        lambda: around(
            DIYForCausalLM, "load_state_dict", lambda load, self, values, **kw: load(self, values, strict=False)
        ),
        ("state.strict_load",),
        tests=(test_state.test_what_does_not_fit_is_refused_by_name,),
    ),
    Mutation(
        "state-outside-checkpoint",
        lambda: around(
            RotaryEmbedding,
            "__init__",
            lambda init, self, size, theta: init(self, size, theta * (1 + torch.rand(1).item())),
        ),
        ("state.round_trip",),
    ),
    Mutation(
        "block-shared",
        lambda: after_init(
            lambda model: setattr(model, "layers", nn.ModuleList([model.layers[0]] * len(model.layers)))
        ),
        ("state.depth_adds_parameters",),
        tests=(test_state.test_every_weight_of_the_architecture_is_registered_once,),
    ),
    Mutation(
        "parameters-unregistered",
        mlp_in_a_list,
        ("state.every_parameter_registered",),
        tests=(test_state.test_every_weight_of_the_architecture_is_registered_once,),
    ),
    Mutation(
        "shallow copy",
        lambda: mock.patch.object(DIYForCausalLM, "__deepcopy__", lambda self, memo: copy.copy(self), create=True),
        ("state.deepcopy",),
    ),
    # Generation
    Mutation(
        "eos-not-per-row: any row stops all",
        lambda: generate_as(stop_when_any_row_is_finished),
        ("generation.eos_per_row",),
        tests=(test_generate.test_each_row_is_its_prompt_then_what_it_gets_alone_then_padding,),
    ),
    Mutation(
        "eos-not-per-row: finished rows go on",
        lambda: generate_as(lambda generate, *args, eos_token_id=None, **kw: generate(*args, **kw)),
        ("generation.eos_per_row",),
        tests=(test_generate.test_each_row_is_its_prompt_then_what_it_gets_alone_then_padding,),
    ),
    Mutation(
        "continues-from-pad",
        lambda: around(
            diymodel.model, "_last_positions", lambda last, hidden, lengths, count: last(hidden, None, count)
        ),
        ("generation.padded_prompt",),
        tests=(test_model.test_kept_logits_are_the_last_of_each_row,),
    ),
    Mutation(
        "temperature-zero",
        lambda: choose_as(lambda choose, logits, temperature, *rest: choose(logits, temperature or 9.0, *rest)),
        ("generation.temperature_zero",),
    ),
    Mutation(
        "temperature-misapplied",
        lambda: choose_as(
            lambda choose, logits, temperature, *rest: choose(logits * temperature**2, temperature, *rest)
        ),
        ("generation.follows_distribution",),
    ),
    Mutation(
        "generator-reseeded",
        lambda: choose_as(
            lambda choose, *args: choose(*args[:-1], args[-1] and args[-1].manual_seed(args[-1].initial_seed()))
        ),
        ("generation.follows_distribution",),
    ),
    Mutation(
        "context-crop-wrong",
        lambda: generate_as(goes_on_from_the_beginning),
        ("generation.past_context",),
    ),
    Mutation(
        "top-k-edge",
        lambda: choose_as(
            lambda choose, logits, t, k, *rest: choose(logits, t, k and min(k, logits.shape[-1] // 2), *rest)
        ),
        ("generation.top_k",),
    ),
    Mutation(
        "top-p-edge",
        lambda: choose_as(
            lambda choose, logits, t, k, p, *rest: choose(0 * logits if p and p < 1e-2 else logits, t, k, None, *rest)
        ),
        ("generation.top_p",),
    ),
    Mutation(
        "the token that reaches top_p left out",
        lambda: choose_as(lambda choose, logits, t, k, p, *rest: choose(logits, t, k, p and max(p - 0.1, 1e-9), *rest)),
        ("generation.top_p",),
    ),
    Mutation(
        "repetition-penalty-wrong",
        lambda: around(
            generate_module, "_penalise", lambda _, logits, seen, penalty: torch.where(seen, logits / penalty, logits)
        ),
        ("generation.repetition_penalty",),
    ),
    Mutation(
        "repetition penalty in every row",
        lambda: around(
            generate_module, "_penalise", lambda penalise, logits, seen, *rest: penalise(logits, seen.any(0), *rest)
        ),
        ("generation.repetition_penalty",),
    ),
    Mutation(
        "seed-ignored",
        lambda: generate_as(lambda generate, *args, seed=None, **kw: generate(*args, **kw)),
        ("generation.seed_repeats",),
        tests=(test_generate.test_a_seed_draws_the_same_with_and_without_cache,),
    ),
    Mutation(
        "seed fixed",
        lambda: generate_as(lambda generate, *args, seed=None, **kw: generate(*args, seed=0, **kw)),
        ("generation.seed_repeats",),
    ),
    Mutation(
        "mode-not-restored",
        lambda: around(generate_module, "eval_mode", lambda mode, model: contextlib.nullcontext(model.eval())),
        ("generation.restores_mode",),
    ),
    Mutation(
        "mode restored for all modules alike",
        lambda: generate_as(lambda generate, model, *args, **kw: (generate(model, *args, **kw), model.train())[0]),
        ("generation.ignores_training_mode",),
    ),
    Mutation(
        "mode restored on success only",
        lambda: around(generate_module, "eval_mode", without_finally),
        tests=(test_generate.test_a_failing_callback_leaves_no_trace,),
    ),
    Mutation(
        "global-random-state-changed",
        lambda: generate_as(lambda generate, *args, **kw: (torch.rand(1), generate(*args, **kw))[1]),
        ("generation.random_state_untouched",),
    ),
    Mutation(
        "weights frozen by generation",
        lambda: generate_as(
            lambda generate, model, *args, **kw: (generate(model, *args, **kw), model.requires_grad_(False))[0]
        ),
        ("generation.leaves_nothing",),
    ),
    Mutation(
        "tensor-left-behind",
        lambda: generate_as(
            lambda generate, model, input_ids, *args, **kw: (
                generate(model, input_ids, *args, **kw) * torch.ones(1, dtype=torch.int64)
            )
        ),
        ("state.makes_on_device",),
    ),
    Mutation(
        "prompt written in place",
        lambda: generate_as(
            lambda generate, model, input_ids, *args, **kw: generate(model, input_ids.clamp_(max=1), *args, **kw)
        ),
        ("generation.inputs_unchanged",),
    ),
    Mutation(
        "generation-overflow", lambda: mock.patch.object(generate_module, "_check"), ("generation.overlong_refused",)
    ),
]
