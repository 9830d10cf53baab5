"""Autoregressive generation, with and without the KV cache.

Shapes: B batch, T prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.compiled import compiled_decoder
from diymodel.config import DIYConfig
from diymodel.inputs import check_input_ids, seq_lengths_of


def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    *,
    use_cache: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], object] | None = None,
    compile: bool = False,  # noqa: A002 - what it does is torch.compile
) -> Tensor:
    """Continue every row of a batch, greedily by default. Also a method: ``model.generate(...)``.

    Args:
        model: a :class:`diymodel.DIYForCausalLM`. It runs in eval mode, and is left in the mode it was in.
        input_ids: (B, T) prompts, short ones padded on the right.
        max_new_tokens: most tokens to add to a row; at least 0.
        attention_mask: (B, T), 1 for a token and 0 for padding on the right. None: no padding.
        use_cache: True computes each position once; False recomputes the whole sequence for each token.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest only; more than V means V.
        top_p: draw among the likeliest tokens whose probabilities just reach p, at least one; in (0, 1].
        repetition_penalty: logits of tokens already in the row are divided by it where positive and multiplied where
            negative (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
        eos_token_id: token, or tokens, after which a row is finished.
        pad_token_id: fills finished and short rows. Default: the config's, else the first ``eos_token_id``, else 0.
        seed: seed of the draws, in [0, 2**64); the same seed gives the same tokens with and without cache. The global
            random state is neither used nor changed. None: drawn from the operating system.
        generator: draws from this instead, on the model's device.
        on_token: called after each step with the new tokens (B,), for streaming; a finished row shows padding.
        compile: run the steps on the cache compiled, with CUDA graphs on CUDA. The first call takes the seconds that
            compiling takes; later ones with as many rows, and lengths up to the same power of two, find it done. The
            tokens are those of ``compile=False`` up to rounding: logits differ by about 1e-6 of their size in float32.

    Returns:
        (B, longest row) int64: each row's real prompt tokens, directly followed by its new ones, then padding. It ends
        early when all rows are finished.

    Raises:
        TypeError: an argument that must be a whole number is none; before any work.
        ValueError: an argument does not fit, or prompt and new tokens would exceed ``max_seq_len``, or the step cannot
            be compiled here; before any work.
    """
    lengths = _prompt_lengths(input_ids, attention_mask)
    longest = int(lengths.max())
    config = model.config
    check_input_ids(input_ids, config.vocab_size)
    _check(config, longest, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, generator)
    if temperature == 0 and (top_k is not None or top_p is not None):
        warnings.warn("top_k and top_p are ignored at temperature 0, which is greedy", stacklevel=2)
    if compile and not use_cache:
        raise ValueError("compile=True compiles the step on the cache, and use_cache=False has none: drop one of them")
    eos = _eos_tokens(eos_token_id, config, input_ids.device)
    pad = _pad_token(pad_token_id, config, eos)
    if generator is None and temperature > 0:
        generator = torch.Generator(input_ids.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)

    B = input_ids.shape[0]
    ragged = bool((lengths != longest).any())
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode())
        fast = None
        if compile and max_new_tokens > 1:
            fast = stack.enter_context(compiled_decoder(model, B, longest + max_new_tokens))
        tokens = input_ids.new_full((B, longest + max_new_tokens), pad, dtype=torch.int64)
        real = torch.arange(longest, device=tokens.device) < lengths[:, None]
        tokens[:, :longest] = torch.where(real, input_ids[:, :longest], pad)
        seen = _tokens_seen(tokens[:, :longest], real, config.vocab_size) if repetition_penalty != 1 else None
        finished = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        past = None
        column = tokens[:, :0]
        end = longest
        for end in range(longest + 1, longest + max_new_tokens + 1):
            seq_lengths = lengths if ragged else None
            if not use_cache:
                logits = model(tokens[:, : end - 1], seq_lengths=seq_lengths, logits_to_keep=1)
            elif past is None:
                logits, past = model(tokens[:, :longest], seq_lengths=seq_lengths, use_cache=True, logits_to_keep=1)
                if fast is not None:
                    fast.start(past, longest)
            elif fast is not None:
                logits = fast.step(column)
            else:
                logits, past = model.decode_step(column, past)
            logits = logits.select(1, -1)
            if seen is not None:
                logits = _penalise(logits, seen, repetition_penalty)
            new = choose(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                new = new.masked_fill(finished, pad)
            column = new.unsqueeze(1)
            if ragged:
                tokens.scatter_(1, lengths[:, None], column)
                lengths = lengths + 1
            else:
                tokens.select(1, end - 1).copy_(new)
            if seen is not None:
                seen.scatter_(1, column, True)
            if on_token is not None:
                on_token(new)
            if eos is not None:
                finished |= torch.isin(new, eos)
                if bool(finished.all()):
                    break
    return tokens[:, :end].clone()


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token a row, (B,), from logits (B, V): the likeliest at temperature 0, else drawn.

    ``top_k`` and ``top_p`` keep a set of candidates, in this order; both always keep the likeliest token.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Shifted so that the largest logit is 0: a small temperature then divides to -inf, never to inf - inf.
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(scaled.dtype).tiny)
    if top_k is not None and top_k < scaled.shape[-1]:
        kept = scaled.topk(top_k, dim=-1)
        scaled = torch.full_like(scaled, -torch.inf).scatter(1, kept.indices, kept.values)
    probabilities = scaled.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        before = ranked.cumsum(dim=-1) - ranked  # 0 for the likeliest, which is therefore always kept
        probabilities = probabilities.scatter(1, order, ranked.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _tokens_seen(prompt: Tensor, real: Tensor, vocab_size: int) -> Tensor:
    """(B, V), True for each token among a row's real prompt tokens."""
    counts = torch.zeros(prompt.shape[0], vocab_size, dtype=torch.int64, device=prompt.device)
    return counts.scatter_add_(1, prompt, real.to(torch.int64)) > 0


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _prompt_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Real tokens of each row, (B,)."""
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids must be (batch, seq) with at least one token to continue from, got {tuple(input_ids.shape)}"
        )
    B, T = input_ids.shape
    if attention_mask is None:
        return torch.full((B,), T, device=input_ids.device)
    lengths = seq_lengths_of(attention_mask, input_ids)
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of attention_mask has no token to continue from")
    return lengths


def _check(
    config: DIYConfig,
    longest: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    seed: int | None,
    generator: torch.Generator | None,
) -> None:
    _check_whole("max_new_tokens", max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} make {longest + max_new_tokens} "
            f"positions, more than max_seq_len={config.max_seq_len}: at most "
            f"{max(config.max_seq_len - longest, 0)} new tokens fit"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be a finite number, 0 or above")
    if top_k is not None:
        _check_whole("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(f"repetition_penalty={repetition_penalty} must be a finite number above 0")
    if seed is not None:
        _check_whole("seed", seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must be in [0, 2**64)")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator both say where the draws come from: give one of them")


def _eos_tokens(eos_token_id: int | Sequence[int] | None, config: DIYConfig, device: torch.device) -> Tensor | None:
    if eos_token_id is None:
        return None
    if isinstance(eos_token_id, str) or not isinstance(eos_token_id, Iterable):
        ids = [eos_token_id]  # a text is not taken apart: it is refused as it is
    else:
        ids = list(eos_token_id)
    for token in ids:
        _check_token("eos_token_id", token, config)
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _pad_token(pad_token_id: int | None, config: DIYConfig, eos: Tensor | None) -> int:
    if pad_token_id is not None:
        _check_token("pad_token_id", pad_token_id, config)
        return pad_token_id
    if config.pad_token_id is not None:
        return config.pad_token_id
    return int(eos[0]) if eos is not None and len(eos) else 0


def _check_token(name: str, token: int, config: DIYConfig) -> None:
    _check_whole(name, token)
    if not 0 <= token < config.vocab_size:
        raise ValueError(f"{name}={token} is outside the vocabulary [0, {config.vocab_size})")


def _check_whole(name: str, value: object) -> None:
    try:
        operator.index(value)  # type: ignore[arg-type]  # numbers of NumPy and torch are as good as Python's
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a whole number, not a {type(value).__name__}") from None
