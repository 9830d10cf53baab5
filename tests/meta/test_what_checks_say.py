"""What a person reads of a failure or a skip: our model, broken at a known place. Of the zoo's bugs: texts.py."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diymodel.loss
from diymodel import DIYConfig, DIYForCausalLM
from diymodel.counting import Flops
from diymodel.model import DIYModel, ModelBlock, RotaryEmbedding
from diymodel.verify.failure import CheckFailure, NotApplicable
from diymodel.verify.given import Checkpoint, Opened
from diymodel.verify.randomness import seeded
from diymodel.verify.subject import OWN, Subject, resolve
from diymodel.verify.trial import Trial
from tests.meta.mutations import (
    after_init,
    around,
    attention,
    choose_as,
    generate_as,
    ids_as,
    logits_as,
    loss_as,
    visible,
    without_dropout,
)
from tests.meta.texts import assert_numbers
from tests.meta.verdicts import CHECKS

Patch = Callable[[], AbstractContextManager[Any]]

SMALL = DIYConfig(
    vocab_size=10, num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, intermediate_size=4, max_seq_len=8
)
CONFIG = SMALL.to_dict()
DRAWN = {"config": CONFIG, "weights": 0, "sharpness": 1}
WHOLE = {"rows": 2, "length": 4, "tokens": [[0, 1, 2, 3], [4, 5, 6, 7]]}
LIVE = {**WHOLE, "live": [[0, 1], [1, 3]], "label_shift": 1, "first_ignored": False}
PROMPT = {"rows": 2, "length": 2, "tokens": [[0, 1], [2, 3]]}
ROW = {"length": 2, "tokens": [0, 1]}
ONE = {"length": 2, "tokens": [[0, 1]], "seed": 5}
LONG = {"config": {**CONFIG, "max_seq_len": 32, "vocab_size": 32}}
LINE = {**LONG, "length": 9, "start": 0, "stride": 1}


def put(row: int, position: int, value: float, dtype: torch.dtype | None = None) -> Patch:
    """A logit of every token there, of calls on so many tokens and in that type."""

    def change(_: object, logits: Tensor) -> Tensor:
        if dtype in (None, logits.dtype) and len(logits) > row and logits.shape[1] > position:
            logits = logits.clone()
            logits[row, position] = value
        return logits

    return lambda: logits_as(change)


def nan(row: int, position: int, dtype: torch.dtype | None = None) -> Patch:
    return put(row, position, torch.nan, dtype)


def cached_logits_as(change: Callable[[Tensor], Tensor]) -> AbstractContextManager[Any]:
    def forward(original: Callable[..., Any], self: DIYForCausalLM, *args: Any, **kw: Any) -> Any:
        output = original(self, *args, **kw)
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else output

    return around(DIYForCausalLM, "forward", forward)


def two_losses() -> AbstractContextManager[Any]:
    """One with a gradient, and another from then on, whatever the weights are."""
    calls = itertools.count()
    return logits_as(
        lambda _, logits: logits if next(calls) == 0 else torch.arange(logits.numel()).view_as(logits) % 7.0
    )


def refuses_less(load: Callable[..., Any], model: DIYForCausalLM, values: dict[str, Any], **settings: Any) -> Any:
    """Loads whatever has as many tensors or more, and nothing of it that does not fit."""
    return load(model, values, **settings) if len(values) < len(model.state_dict()) else None


def other_mode(generate: Callable[..., Tensor], model: DIYForCausalLM, *args: Any, **settings: Any) -> Tensor:
    found = generate(model, *args, **settings)
    model.model.train(not model.training)
    return found


def second_of_row_1(generate: Callable[..., Tensor], *args: Any, **settings: Any) -> Tensor:
    """New token: another than the likeliest."""
    found = generate(*args, **settings)
    found[1, 3] = (found[1, 3] + 1) % 10
    return found


def crops_the_prompt_alone(
    _: Callable[..., Tensor], model: DIYForCausalLM, input_ids: Tensor, max_new_tokens: int, **settings: Any
) -> Tensor:
    """To what the model holds, at the start: what is added to a short one is never dropped."""
    dropped = max(0, input_ids.shape[1] - model.config.max_seq_len)
    for _ in range(max_new_tokens):
        new = model(input_ids[:, dropped:])[:, -1:].argmax(-1)
        input_ids, dropped = torch.cat((input_ids, new), 1), dropped + bool(dropped)
    return input_ids


def another_each_time() -> AbstractContextManager[Any]:
    calls = itertools.count()

    def generate(original: Callable[..., Tensor], *args: Any, **settings: Any) -> Tensor:
        found = original(*args, **settings)
        found[:, 2:] = 0
        found[3, -1] = next(calls)
        return found

    return generate_as(generate)


def written(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, **kw: Any) -> Tensor:
    labels[1, 2] = 0
    return loss(logits, labels, **kw)


def only(*dtypes: torch.dtype) -> AbstractContextManager[Any]:
    """The model refuses all other types."""

    def forward(original: Callable[..., Any], self: DIYForCausalLM, *args: Any, **kw: Any) -> Any:
        if self.lm_head.weight.dtype not in dtypes:
            raise TypeError(f"no {self.lm_head.weight.dtype}")
        return original(self, *args, **kw)

    return around(DIYForCausalLM, "forward", forward)


class Vector(nn.Module):
    """A distribution of tokens, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(SMALL.vocab_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits.expand(*input_ids.shape, -1)


@functools.cache
def own() -> Subject:
    """Our model, whose loss is looked up at each call."""
    subject = resolve(OWN)
    subject.convention = replace(
        subject.convention, loss=lambda logits, labels: diymodel.loss.next_token_loss(logits, labels)
    )
    return subject


def of_subject(**attributes: Any) -> Patch:
    """The subject is another in these."""
    return lambda: mock.patch.multiple(own(), **attributes)


def called(**fields: Any) -> Patch:
    """The model is called another way."""
    return lambda: mock.patch.object(own(), "convention", replace(own().convention, **fields))


def raises(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def unless(wrong: Callable[..., bool], error: Exception) -> Callable[..., Any]:
    """For ``around``: an error where ``wrong(self, …)``."""

    def change(original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if wrong(*args, **kw):
            raise error
        return original(*args, **kw)

    return change


def with_method(name: str, method: Callable[..., Any]) -> Patch:
    return lambda: mock.patch.object(DIYForCausalLM, name, method, create=True)


def dropout_of(probability: float) -> Patch:
    def change(backbone: DIYModel) -> None:
        for part in backbone.modules():
            if hasattr(part, "dropout"):
                part.dropout = probability  # type: ignore[assignment]

    return lambda: after_init(change)


def certain() -> AbstractContextManager[Any]:
    return logits_as(lambda _, logits: logits.index_fill(-1, torch.tensor(0), 1e3))


def loaded(module: nn.Module, path: Path) -> nn.Module:
    module.load_state_dict(torch.load(path))
    return module


@contextlib.contextmanager
def compose(*patches: Patch) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch())
        yield


def nothing() -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def grown(self: DIYForCausalLM, size: int) -> None:
    """The head alone has more rows."""
    head = nn.Linear(4, size, bias=False).to(self.lm_head.weight)
    head.weight.data[: self.config.vocab_size] = self.lm_head.weight
    self.lm_head = head


class Table(nn.Module):
    """An embedding of one's own, which is turned before a row of it is taken."""

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__()
        self.weight = like.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.one_hot(ids, len(self.weight)).to(self.weight), self.weight.t())


class OneWay(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, __: Any) -> Any:
        raise RuntimeError("one way")


def second_is_one_way(model: DIYForCausalLM, logits: Tensor) -> Any:
    """Of the calls on a model."""
    model.calls = getattr(model, "calls", 0) + 1
    return OneWay.apply(logits) if model.calls == 2 else logits


def near() -> AbstractContextManager[Any]:
    """Each position sees itself and the one before it."""
    return attention(
        lambda q, k, kw: {"attn_mask": visible(q, k).triu(k.shape[2] - q.shape[2] - 1), "is_causal": False}
    )


FAILURES: list[tuple[str, Patch, dict[str, Any], str]] = [  # a check, a bug, what is drawn, and a regex of what is said
    ("shape.logits", nan(1, 2), WHOLE, "NaN or infinity at row 1, position 2$"),
    (
        "shape.logits",
        lambda: logits_as(lambda _, logits: logits[:, 1:]),
        WHOLE,
        r"\(batch, seq, vocab\) = \(2, 4, 10\), saw \(2, 3, 10\)",
    ),
    ("shape.logits", lambda: logits_as(lambda _, logits: logits.long()), WHOLE, "saw torch.int64"),
    (
        "shape.shortest",
        nan(1, 0),
        {"rows": 2, "length": 1, "tokens": [[0], [1]]},
        r"of shape \(2, 1\) .* finite logits of shape \(2, 1, 10\), saw \(2, 1, 10\), 10 of them NaN",
    ),
    ("shape.longest", nan(0, 7), {}, r"^8 tokens are max_seq_len .* finite logits, saw shape \(1, 8, 10\)"),
    (
        "padding.all_padding_finite",
        nan(1, 2),
        {"batch": 2, **WHOLE, "empty_row": 0},
        "^with row 0 all padding, .* at row 1, position 2$",
    ),
    ("numerics.zeros_finite", nan(1, 2), WHOLE, "at position 2$"),
    (
        "numerics.bfloat16_near_float64",
        nan(0, 5, torch.bfloat16),
        LINE,
        "^bfloat16 logits must be finite, saw a NaN or infinity at position 5$",
    ),
    (
        "numerics.bfloat16_near_float64",
        put(0, 5, 512, torch.bfloat16),
        LINE,
        r"^bfloat16 logits must be those of float64 .*, saw 51\d; first too far at position 5$",
    ),
    (
        "numerics.large_activations_finite",
        nan(0, 5, torch.float16),
        {**LINE, "length": 7},
        "^float16 logits with activations around 400 must be finite, saw a NaN or infinity at position 5$",
    ),
    (
        "loss.value",
        lambda: loss_as(lambda loss, *args, **kw: loss(*args, **kw) + 1),
        LIVE,
        r"for labels \[\[0, 2, -100, -100\], \[4, -100, -100, 0\]\] must .*, saw .* first at the value",
    ),
    (
        "loss.labels_unchanged",
        lambda: loss_as(written),
        {**LIVE, "live": [[1, 2]], "lengths": [4, 4]},
        r"^labels must stay .*\[4, -100, 7, -100\]\], saw .*\[4, -100, 0, -100\]\] after the loss",
    ),
    (
        "loss.labels_unchanged",
        lambda: ids_as(lambda ids: ids.clamp_(max=6)),
        {**LIVE, "lengths": [4, 4]},
        r"^input_ids must stay .*\[4, 5, 6, 7\]\], saw .*\[4, 5, 6, 6\]\] after the loss",
    ),
    (
        "loss.gradient",
        lambda: loss_as(lambda loss, *args, **kw: loss(*args, **kw).detach()),
        LIVE,
        "^the loss must carry a gradient, saw none, and the logits carry one$",
    ),
    (
        "loss.all_ignored",
        lambda: loss_as(lambda loss, *args, **kw: loss(*args, **kw) / 0),
        {**WHOLE, "label_of_first": True},
        "the loss must be finite, saw nan: ",
    ),
    (
        "modes.followed_at_every_depth",
        lambda: around(ModelBlock, "train", lambda train, self, mode=True: train(self, mode) if mode else self),
        WHOLE,
        r"^after train\(False\) every part must be in that mode, saw in the other: model.layers.0(, model\S+){3} "
        f"and {len(list(ModelBlock(SMALL).modules())) - 4} more$",
    ),
    (
        "generation.restores_mode",
        lambda: generate_as(other_mode),
        {**PROMPT, "training": True},
        "^generate must leave every part in its mode: model was in training mode, saw it in eval mode afterwards$",
    ),
    (
        "generation.restores_mode",
        lambda: generate_as(other_mode),
        {**PROMPT, "training": False},
        "^generate must leave every part in its mode: model was in eval mode, saw it in training mode afterwards$",
    ),
    (
        "generation.seed_repeats",
        another_each_time,
        ONE,
        r"^seed 5 must draw .*: first \[0, 1, 0, 0\] in row 3, saw \[0, 1, 0, 1\] the second time$",
    ),
    (
        "generation.rows_draw_independently",
        lambda: choose_as(lambda choose, logits, *rest: choose(logits, *rest)[:1].expand(len(logits))),
        ONE,
        r"^256 equal rows .* probability 0\.\d+, saw token \d first in every row$",
    ),
    (
        "generation.follows_distribution",
        lambda: choose_as(lambda choose, logits, *rest: choose(0 * logits, *rest)),
        {**ONE, "temperature": 0.5},
        r"^after \[0, 1\] at temperature 0.5 the first token must be \d with \S+ \S+, saw it in \d+ of 1024",
    ),
    (
        "generation.follows_distribution",
        lambda: generate_as(lambda generate, *args, **kw: generate(*args, **kw).index_fill(1, torch.tensor(3), 7)),
        {**ONE, "temperature": 1.0},
        r"^after \[0, 1\] at temperature 1.0 and a first token 0, the second must be 7 with .* in (\d+) of \1 draws$",
    ),
    (
        "generation.follows_distribution",
        lambda: generate_as(lambda generate, *args, **kw: generate(*args, **kw).index_fill(1, torch.tensor(3), 10)),
        {**ONE, "temperature": 1.0},
        "^after .* generate must draw one of 10 tokens, saw 10$",
    ),
    (
        "generation.top_k",
        lambda: choose_as(lambda choose, logits, t, k, *rest: choose(logits, t, None, *rest)),
        {**ONE, "top_k": 2},
        r"^top_k=2 of 10 tokens must draw among \[\d, \d\], saw \[\d(, \d){3,}\]$",
    ),
    (
        "generation.top_k",
        lambda: choose_as(lambda choose, logits, *rest: logits.argmax(-1)),
        {**ONE, "top_k": 2},
        r"^top_k=2 of 10 tokens must leave token \d with a probability of 0\.\d+, saw it in none of 256 .* \[\d\]$",
    ),
    (
        "decode.session",
        lambda: around(RotaryEmbedding, "forward", lambda f, self, span, like: f(self, span._replace(start=0), like)),
        {"rows": 1, "steps": [{"start": [1, 2], "rows": 2}, {"unrelated": [3]}, {"append": [4], "back": 0}]},
        r"^step 2, \[\[4\], \[5\]\] on the cache of step 0, must .* logits of \[\[1, 2, 4\], \[2, 3, 5\]\], saw",
    ),
    (
        "decode.session",
        lambda: cached_logits_as(lambda logits: logits + 1),
        {"rows": 1, "steps": [{"unrelated": [3]}, {"append": [1, 2], "back": 0}]},
        r"^step 1, \[\[1, 2\]\] without a cache before them, must .* logits of \[\[1, 2\]\], saw",
    ),
    (
        "gradients.finite",
        lambda: after_init(lambda model: model.norm.weight.register_hook(lambda g: g / 0)),
        {**WHOLE, "lengths": [2, 4]},
        "at model.norm.weight$",
    ),
    (
        "window.width",
        lambda: compose(near, of_subject(window=3)),
        {**WHOLE, "beyond": 0, "shift": 1},
        "^with a window of 3, changing the first token must change the logits 2 positions later, saw no change$",
    ),
    (
        "window.width",
        of_subject(window=2),
        {**WHOLE, "beyond": 1, "shift": 1},
        "^with a window of 2, changing .* no logit 2 or more positions later, saw .* first at row 0, position 2, token",
    ),
    (
        "directory.complete",
        of_subject(directory=lambda: Opened(DIYForCausalLM(SMALL), SMALL, ["a", "b", "c", "d", "e", "f"])),
        {},
        "saw a; b; c; d, and 2 more$",
    ),
    (
        "directory.complete",
        of_subject(directory=lambda: Opened(DIYForCausalLM(SMALL), SMALL, ["a", "b", "c", "d"])),
        {},
        "saw a; b; c; d$",
    ),
    (
        "checkpoint.round_trip",
        of_subject(
            checkpoint=Checkpoint(
                lambda module, path: torch.save(module.state_dict(), path),
                lambda path: loaded(DIYForCausalLM(replace(SMALL, dropout=0.0)), path),
            )
        ),
        {**WHOLE, "config": {**CONFIG, "dropout": 0.5}},
        "^the config of a module from a checkpoint must have dropout=0.5, saw 0.0$",
    ),
    (
        "generation.greedy_is_argmax",
        lambda: generate_as(second_of_row_1),
        {**PROMPT, "new_tokens": 3},
        r"^greedy generation with use_cache=False must .*: after \[2, 3, \d\] that is .* as new token 1 of row 1; ",
    ),
    (
        "generation.past_context",
        lambda: generate_as(crops_the_prompt_alone),
        {**PROMPT, "too_many": 2, "use_cache": False},
        "^of 2 prompt tokens and 8 new ones, more than max_seq_len=8, generate with use_cache=False must refuse before "
        "the first or go on, as it does after 9 prompt tokens, saw ValueError: .*, after 7 calls of forward$",
    ),
    (
        "checkpoint.refuses_code",
        of_subject(checkpoint=Checkpoint(lambda _, path: path.write_bytes(b"0"), lambda _: DIYForCausalLM(SMALL))),
        {"alone": True, "zipped": True},
        "^a checkpoint that contains code must be refused, saw a module built from it$",
    ),
    (
        "generation.padded_prompt",
        lambda: generate_as(lambda generate, *args, **kw: generate(*args, **kw)[:, :-1]),
        {"batch": 2, "length": 3, "tokens": [[0, 1, 2], [3, 4, 5]], "new_tokens": 4, "lengths": [3, 2]},
        r"^row 0 must get 4 new tokens, saw 3 in \[0, 1, 2(, \d)+\]$",
    ),
    (
        "loss.all_ignored",
        lambda: loss_as(lambda loss, logits, *args, **kw: (0 * logits.sum()).abs().sqrt()),
        {**WHOLE, "label_of_first": True},
        "^with every label ignored the loss must have a finite gradient, saw a NaN or infinity$",
    ),
    (
        "state.resized_vocabulary",
        lambda: compose(
            with_method("resize_token_embeddings", lambda *_: None),
            lambda: logits_as(lambda _, logits: {"logits": logits}),
        ),
        {**WHOLE, "added": 2},
        "^with 12 tokens there must be as many logits, saw 10$",
    ),
    (
        "numerics.zeros_finite",
        lambda: after_init(lambda model: model.norm.weight.register_hook(lambda g: g / 0)),
        WHOLE,
        "^with embeddings of zeros the gradient must be finite, saw a NaN or infinity at model.norm.weight$",
    ),
    (
        "state.deepcopy",
        with_method("__deepcopy__", raises(TypeError("never"))),
        WHOLE,
        "must copy the module, saw that the module cannot be copied: TypeError: never$",
    ),
    (
        "state.round_trip",
        with_method("load_state_dict", raises(RuntimeError("other names"))),
        WHOLE,
        "^a state dict must load into a new module of the same config, saw other names$",
    ),
    (
        "training.small_step_lowers_loss",
        lambda: logits_as(lambda _, logits: 2 * logits.detach() - logits),
        ROW,
        r"^small steps along the gradient must change the loss of 4\.\d+ by what the gradient predicts, saw -1 of it, ",
    ),
    (
        "training.small_step_lowers_loss",
        lambda: logits_as(lambda _, logits: 4 * logits - 3 * logits.detach()),
        ROW,
        r" by what the gradient predicts, saw 0\.25 of it, the same for steps of several sizes$",
    ),
    (
        "gradients.finite",
        lambda: logits_as(lambda _, logits: logits.exp().add_(1)),  # in place, and the gradient needs what was there
        {**WHOLE, "lengths": [2, 4]},
        "^the backward pass must run, saw RuntimeError: one of the variables needed for gradient computation has been ",
    ),
    (
        "training.small_step_lowers_loss",
        lambda: logits_as(lambda _, logits: 0 * logits),
        ROW,
        "^at a loss of 2.3 the gradient must not be 0 everywhere$",
    ),
    (
        "training.small_step_lowers_loss",
        two_losses,
        ROW,
        r" by 4\.8e-05 must lower it by about that, saw none; larger steps did no better$",
    ),
    (
        "state.strict_load",
        lambda: around(DIYForCausalLM, "load_state_dict", refuses_less),
        {},
        "^load_state_dict must refuse a state dict with num_layers=2, not 1, saw no error$",
    ),
    (
        "training.small_step_lowers_loss",
        lambda: around(
            DIYForCausalLM, "__init__", lambda init, self, config: (init(self, config), self.requires_grad_(False))[0]
        ),
        ROW,
        "^the module must have parameters to train, saw none with requires_grad$",
    ),
    (
        "gradients.accumulate",
        lambda: logits_as(second_is_one_way),
        ROW,
        "^after backward passes over two batches, .*, saw RuntimeError: one way$",
    ),
    (
        "gradients.checkpointing",
        lambda: compose(
            with_method("gradient_checkpointing_enable", lambda self: setattr(self, "again", True)),
            lambda: logits_as(lambda model, logits: OneWay.apply(logits) if hasattr(model, "again") else logits),
        ),
        ROW,
        "^with gradient checkpointing .*, saw RuntimeError: one way$",
    ),
    (
        "gradients.checkpointing",  # turned on with the settings that it has by itself
        lambda: compose(
            with_method("gradient_checkpointing_enable", lambda self, how="plain": setattr(self, "how", how)),
            lambda: logits_as(lambda model, x: OneWay.apply(x) if getattr(model, "how", "") == "plain" else x),
        ),
        ROW,
        "^with gradient checkpointing .*, saw RuntimeError: one way$",
    ),
    (
        "batch.row_alone",
        lambda: logits_as(lambda _, logits: logits[:, 1:] if len(logits) == 1 else logits),
        {"batch": 2, **WHOLE, "row": 1},
        r"^row 1 of a batch of 2 must give what it gives alone, of shape \(1, 3, 10\), saw \(1, 4, 10\)$",
    ),
    (
        "forward.memory_layout",
        lambda: around(
            DIYForCausalLM,
            "forward",
            unless(lambda _, input_ids, **__: not input_ids.is_contiguous(), ValueError("rows")),
        ),
        {**WHOLE, "layout": "column by column"},
        "^token ids that lie in memory column by column must .*, saw ValueError: rows$",
    ),
    (
        "shape.longest",
        lambda: around(
            DIYForCausalLM, "forward", unless(lambda _, input_ids, **__: input_ids.shape[1] > 7, ValueError("long"))
        ),
        {},
        "^8 tokens are max_seq_len and must be accepted, saw ValueError: long$",
    ),
    (
        "state.resized_vocabulary",
        with_method("resize_token_embeddings", grown),
        {**WHOLE, "added": 2},
        "^the state dict of a module with 12 tokens instead of 10 must load into one built with 12, saw ValueError: ",
    ),
]


SKIPS: list[tuple[str, Patch, dict[str, Any], str]] = [  # what a check leaves alone, and a regex of the reason
    (
        "decode.rows_reordered",
        lambda: around(
            DIYForCausalLM,
            "forward",
            unless(
                lambda *_, past_key_values=None, **__: any(isinstance(kv, dict) for kv, _ in past_key_values or []),
                ValueError("only mine"),
            ),
        ),
        {"batch": 2, "order": [1, 0], **WHOLE},
        "^a cache whose rows were chosen by hand is refused: ValueError: only mine$",
    ),
    ("decode.dtype", lambda: only(torch.float64), WHOLE, "not run in torch.float32: TypeError: no torch.float32$"),
    ("decode.caller_object", called(new_cache=raises(ValueError())), WHOLE, "^its cache is a value"),
    (
        "causality.through_cache",
        lambda: cached_logits_as(lambda logits: logits[:, -1:]),
        {**WHOLE, "prefill": 1, "cut": 2, "shift": 1},
        "^a chunk on a cache does not give the logits of each of its positions$",
    ),
    (
        "causality.gradient",
        lambda: around(
            DIYModel, "forward", lambda f, self, ids, *rest: (self.embed_tokens(ids), f(self, ids, *rest))[1]
        ),
        {**WHOLE, "cut": 2},
        "^the token embedding is not called once with all tokens$",
    ),
    (
        "causality.gradient",
        lambda: logits_as(lambda _, logits: OneWay.apply(logits)),
        {**WHOLE, "cut": 2},
        "^the logits cannot be differentiated: RuntimeError: one way$",
    ),
    (
        "checkpoint.wrapped",
        of_subject(checkpoint=Checkpoint(raises(ValueError("wrapped")), raises(ValueError()))),
        {**WHOLE, "wrapper": "DataParallel"},
        "^a module in DataParallel is not saved: ValueError: wrapped$",
    ),
    ("decode.cost", called(block_mask="mask"), LONG, "^torch counts no FLOPs in flex attention$"),
    (
        "decode.cost",
        lambda: mock.patch("diymodel.verify.checks.decode.count_flops", return_value=Flops(0, 0)),
        LONG,
        "^torch counts no FLOPs in this module's kernels$",
    ),
    ("generation.seed_repeats", certain, ONE, "so likely that two seeds may well draw the same$"),
    ("generation.rows_draw_independently", certain, ONE, "so likely that all rows may well draw it$"),
    (
        "generation.follows_distribution",
        lambda: choose_as(unless(lambda logits, t, *_: t > 1, ValueError("too hot"))),
        {**ONE, "temperature": 2.0},
        "^generate does not take temperature=2.0: ValueError: too hot$",
    ),
    (
        "generation.top_k",
        lambda: choose_as(unless(lambda logits, t, k, *_: k > logits.shape[-1], ValueError("too many"))),
        {**ONE, "top_k": 11},
        "^a top_k above the vocabulary is refused: ValueError: too many$",
    ),
    (
        "generation.top_p",
        lambda: only(torch.float64),
        {**ONE, "count": 1, "top_p": 1e-3, "bfloat16": True},
        "^the module does not generate in bfloat16: TypeError: no torch.bfloat16$",
    ),
    (
        "generation.restores_mode",
        lambda: generate_as(unless(lambda model, *_, **__: model.training, ValueError("eval only"))),
        {**PROMPT, "training": True},
        "^generate refuses training mode: ValueError: eval only$",
    ),
    ("gradients.checkpointing", nothing, ROW, r"^the module has no gradient_checkpointing_enable\(\)$"),
    (
        "gradients.checkpointing",
        with_method("set_grad_checkpointing", raises(NotImplementedError("never"))),
        ROW,
        "^gradient checkpointing is refused: NotImplementedError: never$",
    ),
    ("loss.pad_token_scored", called(ignore_index=0), {**LIVE, "padding": 2}, "^the module ignores labels of 0, which"),
    (
        "loss.all_ignored",
        of_subject(
            claims=(), convention=replace(own().convention, loss=lambda logits, labels: logits.sum() * torch.nan)
        ),
        {**WHOLE, "label_of_first": True},
        "must be finite, saw nan: such .* weights; the subject does not claim 'finite_loss'$",
    ),
    (
        "modes.dropout_active_in_training",
        lambda: compose(without_dropout, dropout_of(0.0)),
        WHOLE,
        "^the module has no dropout: ",
    ),
    (
        "modes.dropout_off_in_eval",
        with_method("load_state_dict", raises(RuntimeError("other names"))),
        WHOLE,
        "^weights .* do not load into one without: RuntimeError: other names$",
    ),
    (
        "modes.agree_without_dropout",
        dropout_of(0.25),
        {**WHOLE, "dropout": 0.0},
        r"^the module keeps its dropout where config.dropout is 0: model.layers.0.\S*dropout=0.25$",
    ),
    (
        "state.resized_vocabulary",
        with_method("resize_token_embeddings", raises(NotImplementedError("fixed"))),
        {**WHOLE, "added": 1},
        "^resize_token_embeddings is refused: NotImplementedError: fixed$",
    ),
    ("state.resized_vocabulary", nothing, WHOLE, r"^the module has no resize_token_embeddings\(\)$"),
    ("state.strict_load", of_subject(_factory=lambda _: Vector()), {}, "^no field of the configuration .* no matrix"),
    (
        "state.depth_adds_parameters",
        of_subject(_factory=lambda _: DIYForCausalLM(SMALL)),
        WHOLE,
        "^num_layers changes neither the parameters nor the logits$",
    ),
    (
        "numerics.bfloat16_near_float64",
        lambda: only(torch.float64),
        LINE,
        "^the module does not run in torch.bfloat16: TypeError: no torch.bfloat16$",
    ),
    (
        "numerics.large_activations_finite",
        lambda: logits_as(lambda _, logits: 1e6 * logits),
        {**LINE, "length": 7},
        "^with large embeddings the module's own activations leave the range of float16$",
    ),
    (
        "numerics.zeros_finite",
        lambda: after_init(lambda model: setattr(model, "embed_tokens", Table(model.embed_tokens))),
        WHOLE,
        "^no nn.Embedding, no class called so and no parameter that is looked up by rows was found$",
    ),
    (
        "padding.all_padding_finite",
        lambda: around(
            DIYForCausalLM,
            "forward",
            unless(lambda *_, seq_lengths=None, **__: seq_lengths is not None, ValueError("empty row")),
        ),
        {"batch": 2, **WHOLE, "empty_row": 0},
        "^a row without a real token is refused: ValueError: empty row$",
    ),
    (
        "padding.right_with_cache",
        lambda: cached_logits_as(lambda logits: logits[:, -1:]),
        {**WHOLE, "chunks": [3, 1], "lengths": [[2, 3], [1, 1]]},
        "^a cached call gives the logits of the last position only, which may be padding$",
    ),
    ("padding.mask_is_used", nothing, ROW, r"^forward\(seq_lengths=…\) can hide no token that stands before others$"),
    (
        "padding.mask_is_used",
        called(lengths=None, mask="attention_mask"),
        {**ROW, "hidden": 0},
        "^a token that stands before others cannot be hidden: ValueError: ",
    ),
    (
        "sensitivity.sees_itself_and_its_past",
        near,
        {**WHOLE, "shift": 1},
        r"^position 3 does not see the first token: if that is a sliding window, say how wide it is, Subject\(…",
    ),
    (
        "sensitivity.sees_itself_and_its_past",
        near,
        {"rows": 1, "length": 3, "tokens": [[0, 1, 2]], "shift": 1},
        "^position 2 does not see the first token: if that is a sliding window",
    ),
    ("window.width", of_subject(window=513), {}, "^a window of 513 is too wide to try: "),
]


def ids(rows: list[tuple[str, Patch, dict[str, Any], str]]) -> list[str]:
    return [f"{number}-{row[0]}" for number, row in enumerate(rows)]


@pytest.mark.parametrize(("check_id", "patch", "drawn", "text"), FAILURES, ids=ids(FAILURES))
def test_a_failure_says(check_id: str, patch: Patch, drawn: dict[str, Any], text: str) -> None:
    own()  # found out about as it is
    with patch(), seeded(), pytest.raises(CheckFailure, match=text) as caught:
        CHECKS[check_id].function(Trial.replaying(own(), {**DRAWN, **drawn}))
    assert_numbers(caught.value)


@pytest.mark.parametrize(("check_id", "patch", "drawn", "text"), SKIPS, ids=ids(SKIPS))
def test_a_skip_says(check_id: str, patch: Patch, drawn: dict[str, Any], text: str) -> None:
    own()
    with patch(), seeded(), pytest.raises(NotApplicable, match=text):
        CHECKS[check_id].function(Trial.replaying(own(), {**DRAWN, **drawn}))
