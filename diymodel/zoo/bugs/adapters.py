"""Bugs behind each way to hold a cache: on the module, made by the caller, counted here or there."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "position-restarts-in-decode",
        "onmodule",
        "self.cos[input_pos], self.sin[input_pos]",
        "self.cos[:T], self.sin[:T]",
        kills=("decode.cached_equals_full",),
        where="OnModule",
    ),
    Bug(
        "chunk-unmasked",
        "onmodule",
        "<= input_pos[:, None]",
        "<= input_pos[-1:, None].expand(T, 1)",
        kills=("decode.chunks",),
        where="OnModule",
    ),
    Bug(
        "position-restarts-in-decode",
        "fastlike",
        "self.rotation[input_pos]",
        "self.rotation[: len(input_pos)]",
        kills=("decode.cached_equals_full",),
        where="FastLike",
    ),
    Bug(
        "mask-sees-next-token",
        "fastlike",
        ".tril()",
        ".tril(1)",
        kills=("causality.edit",),
        where="FastLike",
    ),
    Bug(
        "cache-object-replaced",
        "supplied",
        'assert start + T <= self.limit, f"{start + T} positions are more than {self.limit}"',
        "kv_cache = None if kv_cache is None else KVCache(*(kv_cache.shape[i] for i in (1, 2, 3, 4, 0)))",
        kills=("decode.cached_equals_full",),
        where="Supplied",
    ),
    Bug(
        "position-advances-per-layer",
        "supplied",
        "if layer == self.shape[0] - 1:\n            self.pos = end",
        "self.pos = end",
        kills=("decode.cached_equals_full",),
        where="KVCache",
    ),
    Bug(
        "position-restarts-in-decode",
        "startpos",
        "self.freqs_cis[start_pos : start_pos + T]",
        "self.freqs_cis[:T]",
        kills=("decode.cached_equals_full",),
        where="StartPos",
    ),
    Bug(
        "chunk-mask-top-left",
        "startpos",
        "torch.cat((torch.zeros(T, start_pos, device=tokens.device), mask), 1)",
        "torch.full((T, start_pos + T), -torch.inf, device=tokens.device).triu(1)",
        kills=("decode.chunks",),
        where="StartPos",
    ),
    Bug(
        "state-survives-calls",
        "resettable",
        "            block.att.reset_cache()\n        self.current_pos = 0",
        "            block.att.reset_cache()",
        kills=("decode.unrelated_call",),
        where="Resettable",
    ),
    Bug(
        "position-restarts-in-decode",
        "resettable",
        "self.current_pos += T",
        "self.current_pos = T",
        kills=("decode.cached_equals_full",),
        where="Resettable",
    ),
    Bug(
        "position-restarts-in-decode",
        "intermediates",
        "position[past:, None] - position",
        "position[: x.shape[1], None] - position",
        kills=("decode.cached_equals_full",),
        where="WithIntermediates",
    ),
]
