"""What the text of a failure says, by what was drawn: positions, rows, lengths and tokens, and how much is rounding."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from diymodel.verify.failure import CheckFailure, told_apart
from diymodel.verify.report import Failure

Drawn = Any  # values by name; those of the configuration as config.<field>


def _spans(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """First and last position of chunks one after the other."""
    return [(end - size, end - 1) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def _with_real(sizes: list[int], real: list[list[int]], side: str) -> list[str]:
    return [
        f"row {row}, padded on the {side} (real: {marks}), must give at slots {start} to {last}, on a cache of {start}"
        for row, marks in enumerate(real)
        for start, last in _spans(sizes)
    ]


def _marks(length: int, size: int, left: bool = False) -> list[int]:
    """1 at a real token, 0 at padding."""
    return sorted([1] * length + [0] * (size - length), reverse=not left)


def _left_with_cache(v: Drawn) -> list[str]:
    first = v.length - v.steps
    real = [_marks(length, first, left=True) + [1] * v.steps for length in v.lengths]
    return _with_real([first, *[1] * v.steps], real, "left")


def _right_with_cache(v: Drawn) -> list[str]:
    real = [
        [mark for length, size in zip(lengths, v.chunks, strict=True) for mark in _marks(length, size)]
        for lengths in zip(*v.lengths, strict=True)
    ]
    return _with_real(v.chunks, real, "right")


def _cut_off(v: Drawn) -> list[str]:
    return [f"the first {v.cut} tokens must give the same logits alone as with {v.length - v.cut} more behind them"]


def _micro_batches(v: Drawn) -> list[str]:
    scored = {(row, position) for row, position in v.live}
    counts = [sum(start <= row <= last for row, _ in scored) for start, last in _spans(v.sizes)]
    return [f"micro-batches with {counts} labels must"]


def _must_be_likeliest(v: Drawn) -> list[str]:
    """Of rows that are judged together: what stands before the token."""
    rows = v.tokens * 256  # where there is one, it may be drawn from often
    return [f": after {str(row)[:-1]}" for row in rows]


SAYS: dict[str, Callable[[Drawn], Iterable[str]]] = {  # by check, texts of which a failure holds one
    "batch.permutation": lambda v: [f"rows in the order {v.order} must"],
    "batch.row_alone": lambda v: [f"row {v.row} of a batch of {v.batch} must"],
    "causality.edit": lambda v: [f"changing the token at position {v.cut} must"],
    "causality.gradient": lambda v: [
        f"the gradient of the logits before position {v.cut} to",
        f"the logits before position {v.cut} must",
    ],
    "causality.in_training": lambda v: [f"changing the token at position {v.cut} must"],
    "causality.large_scores": lambda v: [f", another token at position {v.cut} must"],
    "causality.long_row": _cut_off,
    "causality.through_cache": lambda v: [f"on a cache of {v.prefill}, changing the token at position {v.cut} must"],
    "causality.truncation": _cut_off,
    "checkpoint.wrapped": lambda v: [f"a checkpoint of a module in {v.wrapper} must load"],
    "context.order_beyond": lambda v: [f"of {v.config.max_seq_len + 3} tokens", "exchanging those at positions"],
    "context.overlong_refused": lambda v: [
        f"{v.config.max_seq_len + 1} tokens are more than max_seq_len={v.config.max_seq_len} and must",
        f"on a cache of {v.config.max_seq_len} is more than max_seq_len={v.config.max_seq_len} and must",
    ],
    "decode.cached_equals_full": lambda v: [
        "prefill must give",
        *(f"a prefill of {v.prefill}, the cached step for position {t} must" for t in range(v.prefill, v.length)),
    ],
    "decode.chunks": lambda v: [
        f"tokens {start} to {end - 1} on a cache of {start} must"
        for start, end in itertools.pairwise([0, *v.cuts, v.length])
    ],
    "decode.long_row": lambda v: [f" of {v.length} on a cache of "],
    "decode.reset": lambda v: [f"after a cache of {v.used_rows} rows was used"],
    "decode.rows_reordered": lambda v: [f"of the rows {v.order} of {[row[:-1] for row in v.tokens]}, the next"],
    "decode.step_shape": lambda v: [f"(batch, 1, vocab) {(v.rows, 1, v.config.vocab_size)}, saw"],
    "forward.inputs_unchanged": lambda v: [f"input_ids must stay {v.tokens}, saw"],
    "forward.memory_layout": lambda v: [f"that lie in memory {v.layout} must"],
    "generation.cached_greedy_is_argmax": _must_be_likeliest,
    "generation.eos_in_prompt": lambda v: [
        f"eos={v.tokens[v.row][v.place]} (a new one: it stands in the prompt of row {v.row} too) alone",
        f"after its eos={v.tokens[v.row][v.place]}, row ",
    ],
    "generation.eos_per_row": lambda v: [
        f"of a batch of {v.batch} must hold only ",
        *(f"after {str(row)[:-1]}" for row in v.tokens),
    ],
    "generation.follows_distribution": lambda v: [
        f"after {v.tokens[0]} at temperature {getattr(v, 'temperature', 1.0)} the first token must be",
        f"after {v.tokens[0]} at temperature {getattr(v, 'temperature', 1.0)} and a first token",
    ],
    "generation.greedy_is_argmax": lambda v: [*_must_be_likeliest(v), f"one of {v.config.vocab_size}, saw"],
    "generation.ignores_training_mode": lambda v: [*_must_be_likeliest(v), "in its mode: "],
    "generation.inputs_unchanged": lambda v: [f"the prompt must stay {v.tokens}, saw"],
    "generation.keeps_prompt": lambda v: [
        f"{v.length} prompt tokens and {v.new_tokens} new ones of {len(v.tokens)} rows must come back as "
        f"{(len(v.tokens), v.length + v.new_tokens)} token ids, saw",
        f"must begin with {v.tokens}, saw",
    ],
    "generation.leaves_nothing": lambda v: [
        f"after {v.new_tokens} tokens were generated from {[v.tokens[0][: v.prompt]]}, a call must give what it gives",
    ],
    "generation.overlong_refused": lambda v: [
        f"a prompt of {v.length} and {v.config.max_seq_len - v.length + v.too_many} new tokens are more than "
        f"max_seq_len={v.config.max_seq_len} and must be refused"
    ],
    "generation.padded_prompt": lambda v: [
        f"with {side} padding, real lengths {v.lengths}, row {row} must go on" + " with what is the likeliest"
        for side in ("left", "right")
        for row in range(v.batch)
    ],
    "generation.repetition_penalty": lambda v: [
        f"with repetition_penalty={v.penalty:g}{' and all logits below 0' * v.negative}, a new token must be"
    ],
    "generation.seed_repeats": lambda v: [
        f"seeds {v.seed} and {v.seed + 1} must draw different tokens in 256 rows",
        f"seed {v.seed} must draw the same tokens each time: first {str(v.tokens[0])[:-1]}",
    ],
    "generation.temperature_zero": lambda v: [f"temperature=0 with {v.beside}=" if v.beside else "temperature=0 must"],
    "generation.top_k": lambda v: [f"top_k={v.top_k} of {v.config.vocab_size} tokens must"],
    "generation.top_p": lambda v: [f"top_p={v.top_p}{' in bfloat16' * v.bfloat16} must"],
    "gradients.absent_tokens_zero": lambda v: [
        f"token {token} does not occur in {v.tokens}: "
        for token in {*range(v.config.vocab_size)} - {token for row in v.tokens for token in row}
    ],
    "gradients.long_row_finite": lambda v: [f"of a row of {v.length // 2**halved} tokens must" for halved in range(7)],
    "loss.items_in_batch": lambda v: [f"with num_items_in_batch={len(v.live) + v.others}, {len(v.live)} of them in"],
    "loss.labels_change_no_logit": lambda v: [", the logits must be those without"],
    "loss.many_labels": lambda v: [f" of {v.rows * (v.length - 1)} labels must"],
    "loss.micro_batches_add_up": _micro_batches,
    "loss.pad_token_scored": lambda v: [f"that of label {v.padding} included"],
    "packing.documents_do_not_meet": lambda v: [f"of the lengths {v.documents}, changing the token at {v.place} must"],
    "padding.all_padding_finite": lambda v: [f"with row {v.empty_row} all padding, every logit must"],
    "padding.content_irrelevant": lambda v: [f"(real lengths {v.lengths}) must"],
    "padding.content_irrelevant_with_cache": lambda v: [
        f"(real: {[_marks(n, v.length - v.steps, v.left) + [1] * v.steps for n in v.lengths]}) must"
    ],
    "padding.left_changes_nothing": lambda v: [
        f"row {row}, {v.length - n} of padding and then {n} real, must" for row, n in enumerate(v.lengths)
    ],
    "padding.left_with_cache": _left_with_cache,
    "padding.mask_is_used": lambda v: [f"hiding the token at position {v.hidden} of {[v.tokens]} by"],
    "padding.nan_contained": lambda v: [f"(real tokens: {[_marks(n, v.length, v.left) for n in v.lengths]}) must"],
    "padding.right_changes_nothing": lambda v: [
        f"row {row} with {n} real tokens and {v.length - n} of padding must" for row, n in enumerate(v.lengths)
    ],
    "padding.right_with_cache": _right_with_cache,
    "sensitivity.order_matters": lambda v: [f"of the tokens {v.three[:3]} must"],
    "sensitivity.shift_invariance": lambda v: [f"moving every position by {v.offset} must"],
    "shape.longest": lambda v: [f"{v.config.max_seq_len} tokens are max_seq_len and must"],
    "shape.shortest": lambda v: [f"of shape {(v.rows, v.length)} are the shortest"],
    "state.depth_adds_parameters": lambda v: [
        f"{v.config.num_layers + 1} layers must have more parameters than {v.config.num_layers}, saw"
    ],
    "state.resized_vocabulary": lambda v: [f"with {v.config.vocab_size + v.added} tokens"],
    "training.overfits_a_tiny_batch": lambda v: [f"steps on {[v.tokens]} must"],
}


def assert_says(failure: Failure, check_id: str) -> None:
    """The text names what was drawn, and its numbers are those of the failure."""
    message = failure.message
    assert re.search(r"\bmust\b", message), message  # what the property is
    assert "None" not in re.sub("`[^`]*`", "", message)  # but in a line of the subject's
    drawn = SimpleNamespace(**{"left": False, **failure.values, "config": SimpleNamespace(**failure.config)})
    if check_id in SAYS:
        assert any(text in message for text in SAYS[check_id](drawn)), message
    assert_numbers(failure)
    if found := re.search(r"of (\d+) bytes that was cut to (\d+) ", message):
        assert int(found.group(2)) == int(found.group(1)) * drawn.kept // 1000


def assert_numbers(failure: Failure | CheckFailure) -> None:
    """What the text says of a difference and of rounding is what the report holds."""
    message = failure.message
    assert (failure.tolerance is None) == (failure.max_abs_diff is None)
    difference = tolerance = None
    if failure.max_abs_diff is not None and failure.tolerance is not None:
        difference, tolerance = told_apart(failure.max_abs_diff, failure.tolerance)
    if found := re.search(r"(?:rounding|which) explains (\S+?)(?:,|;|$)", message):
        assert found.group(1) == tolerance
    if found := re.search(r"(?:difference is|difference of|to rounding.*saw) ([\d.e+-]+|inf)\b", message):
        assert found.group(1) == difference, message
    if found := re.search(r"on \[\[(.*)\]\] .* loss of (\S+) below (\S+), saw (.*) at rates of (.*)$", message):
        first, enough, *last = map(float, (*found.groups()[1:3], *found.group(4).split(", ")))
        others = found.group(1).count(",")  # than the first token, which a last bias can but take to be equally likely
        assert enough == pytest.approx(min(first / 3, math.log(others) / 2 if others > 1 else first), rel=0.01)
        assert min(last) >= enough
        assert len(last) == found.group(5).count(",") + 1
    if found := re.search(r"that is (\d+) with logit (\S+), saw (\d+) with (\S+) as new token", message):
        assert found.group(1) != found.group(3)
        assert float(found.group(2)) > float(found.group(4))
