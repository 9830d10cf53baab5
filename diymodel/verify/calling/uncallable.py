"""What is said of a module that no way of calling it suits: what was tried, where it failed, what to write instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.convention import Convention
from diymodel.verify.failure import SubjectError, began, crashed, said, said_where

ROWS, LENGTH = 3, 4  # apart, and neither the number of heads: a mask of another shape must not pass for one of these
_INSTEAD = "name a function config -> module instead, whose forward"
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "max_seq_len")


class Tried(NamedTuple):
    """A way to call a module, and what came of it."""

    way: Convention
    error: Exception


def sample_ids(config: DIYConfig, length: int = LENGTH) -> Tensor:
    """Token ids (ROWS, length) that a module is tried with."""
    return torch.arange(ROWS * length).view(ROWS, length) % config.vocab_size


def wrong_logits(lm: LM, ids: Tensor) -> Exception | None:
    """What is wrong with the logits of all positions; None: nothing."""
    name, expected = lm.convention.ids, (*ids.shape, lm.config.vocab_size)
    try:
        logits = lm.logits(ids)
    except Exception as error:  # a stranger's forward may raise anything
        return error
    if tuple(logits.shape) == expected:
        return None
    return SubjectError(
        f"forward({name}) of shape {expected[:2]} gave logits of shape {tuple(logits.shape)}: expected {expected}"
    )


def uncallable(module: nn.Module, config: DIYConfig, tried: Sequence[Tried]) -> SubjectError:
    """The error of a module that failed in every way that was ``tried``, the plainest first."""
    plain, *others = tried
    labels = next((other for other in others if other.way == replace(plain.way, logits_need_labels=True)), None)
    cached = next((other for other in others if other.way.always_cached and not plain.way.always_cached), None)
    shown = labels if labels is not None and not began(plain.error) else plain
    given = f"token ids and {plain.way.labels}" if shown is labels else "token ids"
    text = said_where(shown.error)
    if not isinstance(shown.error, SubjectError):
        sizes = ", ".join(f"{name}={getattr(config, name)}" for name in _SIZES)
        text = f"forward failed on {given}: {text}; it was given {ROWS} rows of {LENGTH} tokens, and built with {sizes}"
    if shown is plain and labels is not None and said(labels.error) != said(plain.error):
        text += f"; with {plain.way.labels}: {said_where(labels.error)}"
    if cached is not None:
        text += f"; on a cache made first: {said_where(cached.error)}"
    advice = _of_lengths(module, config, shown.way)
    if advice is None and crashed(shown.error) and len({said_where(way.error) for way in tried}) == 1:
        return SubjectError(f"{text}; however it is called, it fails there")
    return SubjectError(f"{text}; {advice or _advice(shown, cached)}")


def only_multiples(lm: LM) -> int | None:
    """The number whose multiples alone are taken as lengths, as blockwise attention and chunked recurrences do."""
    lengths = range(1, lm.config.max_seq_len + 1)
    taken = [T for T in lengths if wrong_logits(lm, sample_ids(lm.config, T)) is None]
    return taken[0] if len(taken) > 1 and taken[0] > 1 and taken == [*lengths[taken[0] - 1 :: taken[0]]] else None


def refuses_between(lm: LM, step: int) -> SubjectError:
    """The error of a module that takes multiples of ``step`` alone, be it by design or by a mistake."""
    error = wrong_logits(lm, sample_ids(lm.config, step + 1))
    assert error is not None
    return SubjectError(f"forward failed on {step + 1} tokens: {said_where(error)}; {_of_multiples(step)}")


def _of_multiples(step: int) -> str:
    """What to write where lengths must be multiples."""
    return f"lengths that are multiples of {step} alone are taken: {_INSTEAD} pads behind to one and cuts the logits"


def _of_lengths(module: nn.Module, config: DIYConfig, way: Convention) -> str | None:
    """What to write where other lengths are taken; None: none is."""
    whole = config.max_seq_len
    if (step := only_multiples(LM(module, config, way))) is not None:
        return _of_multiples(step)
    if wrong_logits(LM(module, config, way), sample_ids(config, whole)) is None:
        return f"all {whole} tokens are taken: {_INSTEAD} pads to max_seq_len and cuts the logits"
    if wrong_logits(LM(module, config, way), sample_ids(config, 1)) is None:
        return f"one token at a time is taken: {_INSTEAD} feeds them singly"
    return None


def _advice(shown: Tried, cached: Tried | None) -> str:
    """What to write instead."""
    way, fields = shown.way, []
    if way.causal or way.mask:
        fields.append(f"causal={way.causal or way.mask!r}")
    if way.past or cached is not None:
        fields += ["always_cached=True", "new_cache=lambda module, config, rows: …"]
    or_say = f", or say how it is called: Subject(factory, {', '.join(fields)})" if fields else ""
    return f"{_INSTEAD}({way.ids}) returns logits (batch, seq, vocab){or_say}"
