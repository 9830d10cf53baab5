"""Peers made of our own blocks, and nanoGPT as the zoo has it: loops that people write, without anybody's package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.caches import ConcatenatedDecoder, MaskedDecoder
from diymodel.bench.compiled import engine_decoder
from diymodel.bench.decoders import Decoder, greedy
from diymodel.bench.peers.rival import Rival, Room
from diymodel.model import DIYForCausalLM
from diymodel.zoo.base import BASES


def masked(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """As gpt-fast: a buffer of full length under a mask, positions as tensors; its step is compiled as a whole.

    On CUDA the compiled step is a CUDA graph as well, as gpt-fast has it.
    """
    decoder: MaskedDecoder | None = None

    def current() -> MaskedDecoder:
        nonlocal decoder
        if decoder is None or decoder.buffer.dtype != model.lm_head.weight.dtype:
            rows, positions = room
            engine = "masked_compiled_graph" if model.lm_head.weight.is_cuda else "masked_compiled"
            make = functools.partial(engine_decoder, engine) if compiled else MaskedDecoder
            decoder = make(model, positions, rows)
        return decoder

    return Rival(
        lambda ids: current().extend(ids, None),
        lambda ids, state: current().extend(ids, state),
        same_weights=True,
        to=lambda dtype: None,
        note="our blocks",
    )


def concatenated(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """A cache that grows by torch.cat."""
    decoder = ConcatenatedDecoder(model)
    return Rival(_prefill(decoder), decoder.extend, same_weights=True, to=lambda dtype: None, note="our blocks")


def uncached(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """Our own model, which computes the whole sequence again at every step."""

    def whole(ids: Tensor) -> tuple[Tensor, Tensor]:
        return model(ids, logits_to_keep=1), ids

    def generate(prompt: Tensor, tokens: int) -> Tensor:
        continued: Tensor = model.generate(prompt, tokens, use_cache=False)
        return continued

    return Rival(
        whole,
        lambda ids, state: whole(torch.cat((state, ids), 1)),
        same_weights=True,
        to=lambda dtype: None,
        generate=generate,
        note="our blocks",
    )


def nano_gpt(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """nanoGPT's architecture and loop, without a cache: LayerNorm, GELU, learned positions; weights of its own."""
    subject = BASES["nanogpt"].subject()
    weight = model.lm_head.weight
    module = subject.build(model.config).to(weight.device).eval()

    def whole(ids: Tensor) -> tuple[Tensor, Tensor]:
        return module(ids)[0], ids

    return Rival(
        whole,
        lambda ids, state: whole(torch.cat((state, ids), 1)),
        same_weights=False,
        to=module.to,
        generate=lambda prompt, tokens: greedy(_Uncached(module), prompt, tokens, use_cache=False),
    )


class _Uncached:
    is_value = True

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def whole(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.module(ids)[0]
        return logits

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError


def _prefill(decoder: Decoder) -> Callable[[Tensor], tuple[Tensor, Any]]:
    return lambda ids: decoder.extend(ids, None)
