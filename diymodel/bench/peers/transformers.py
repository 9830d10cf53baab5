"""transformers' ``LlamaForCausalLM`` on our weights, with its dynamic and its static cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.compiled import quiet
from diymodel.bench.peers.rival import PeerMissing, Rival, Room, require
from diymodel.config import DIYConfig
from diymodel.hf_form import config_to_hf, weights_to_hf
from diymodel.model import DIYForCausalLM


def dynamic(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """With the cache that it takes when nothing is said. It grows by ``torch.cat``, so it is never compiled."""
    peer = llama_like(model)
    name = _cache_argument(peer)

    def forward(ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        output = peer(input_ids=ids, **{name: past}, use_cache=True, logits_to_keep=1)
        return output.logits, output[name]

    def generate(prompt: Tensor, tokens: int) -> Tensor:
        mask = torch.ones_like(prompt)  # without one, prompt tokens equal to pad_token_id are taken for padding
        return peer.generate(  # type: ignore[no-any-return]
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        )

    def construct() -> object:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(llama_config(model.config))

    return Rival(
        lambda ids: forward(ids, None), forward, same_weights=True, to=peer.to, generate=generate, construct=construct
    )


def static(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """With its cache of fixed length, whose step can be compiled."""
    peer = llama_like(model)
    from transformers import StaticCache

    cache: Any = None
    name = _cache_argument(peer)
    # On CUDA with CUDA graphs, as its own generate compiles it.
    mode = "reduce-overhead" if model.lm_head.weight.is_cuda else None
    step = quiet(torch.compile(peer.forward, dynamic=False, mode=mode)) if compiled else peer

    def prefill(ids: Tensor) -> tuple[Tensor, Any]:
        nonlocal cache
        if cache is None or cache.dtype != peer.dtype:
            cache = _Kept(StaticCache(config=peer.config, max_cache_len=room.positions), peer.dtype)
        cache.store.reset()
        positions = torch.arange(ids.shape[1], device=ids.device)
        return forward(peer, ids, positions)

    def forward(call: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        output = call(
            input_ids=ids,
            **{name: cache.store},
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits, positions[-1:] + 1

    return Rival(prefill, lambda ids, position: forward(step, ids, position), same_weights=True, to=peer.to)


def _cache_argument(peer: Any) -> str:
    """What the cache is called: ``cache`` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(peer.forward).parameters else "past_key_values"


class _Kept:
    def __init__(self, store: Any, dtype: torch.dtype) -> None:
        self.store = store
        self.dtype = dtype


def llama_config(config: DIYConfig) -> Any:
    """The same architecture in transformers' words.

    No token ends a text: ``generate`` then makes as many tokens as it is asked for, checks for no end, and has nothing
    to warn about.
    """
    import transformers

    values = config_to_hf(config, torch.float32)
    for name in ("architectures", "torch_dtype"):
        del values[name]
    make: Any = transformers.LlamaConfig
    return make(**{**values, "attention_dropout": config.dropout, "pad_token_id": None})


def llama_like(model: DIYForCausalLM) -> Any:
    """A ``LlamaForCausalLM`` with copies of our model's weights, on its device and in its dtype, in eval mode.

    Raises:
        PeerMissing: transformers is not installed.
    """
    require("transformers")
    try:
        from transformers import LlamaForCausalLM
    except ImportError as error:
        raise PeerMissing(f"transformers does not import here: {error}") from error
    weight = model.lm_head.weight
    with torch.random.fork_rng(devices=[]):
        peer: Any = LlamaForCausalLM(llama_config(model.config))
    weights = weights_to_hf(model.state_dict(), model.config)
    peer.load_state_dict({"lm_head.weight": model.lm_head.weight, **weights})
    return peer.to(weight.device, weight.dtype).eval()
