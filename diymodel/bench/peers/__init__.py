"""What others decode with, on the same shapes and, where the architecture agrees, on the same weights.

Each peer is a function ``(model, room, compiled) -> Rival`` that may raise :class:`PeerMissing` with the reason;
none imports its package before it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diymodel.bench.peers.lit import litgpt
from diymodel.bench.peers.loops import concatenated, masked, nano_gpt, uncached
from diymodel.bench.peers.rival import PeerMissing, Rival, Room
from diymodel.bench.peers.transformers import dynamic, llama_like, static
from diymodel.bench.peers.x import x_transformers
from diymodel.model import DIYForCausalLM

PEERS: Mapping[str, Callable[[DIYForCausalLM, Room, bool], Rival]] = {
    "transformers": dynamic,
    "transformers_static": static,
    "litgpt": litgpt,
    "x_transformers": x_transformers,
    "gpt_fast_like": masked,
    "torch_cat": concatenated,
    "uncached": uncached,
    "nanogpt": nano_gpt,
}

__all__ = ["PEERS", "PeerMissing", "Rival", "Room", "same_weights"]


def same_weights(model: DIYForCausalLM) -> tuple[Any, str | None]:
    """transformers' ``LlamaForCausalLM`` with copies of our model's weights; or None, and why there is none."""
    try:
        return llama_like(model), None
    except PeerMissing as missing:
        return None, str(missing)
