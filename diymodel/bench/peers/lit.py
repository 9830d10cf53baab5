"""litgpt's ``GPT`` as a Llama, on our weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diymodel.bench.compiled import quiet
from diymodel.bench.peers.rival import Rival, Room, require
from diymodel.model import DIYForCausalLM

_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.qkv_proj": "attn.qkv",
    "self_attn.o_proj": "attn.proj",
    "mlp.down_proj": "mlp.proj",
    "model.layers": "transformer.h",
}


def litgpt(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """With its cache on the module; its step can be compiled."""
    package = require("litgpt")
    config, weight = model.config, model.lm_head.weight
    settings = package.Config(
        block_size=room.positions,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_query_groups=config.kv_heads,
        n_embd=config.hidden_size,
        rotary_percentage=1.0,
        rope_base=int(config.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=config.mlp_size,
    )
    with torch.random.fork_rng(devices=[]):
        peer = package.GPT(settings)
    peer.load_state_dict(_weights(model), strict=True)
    peer.to(weight.device, weight.dtype).eval()
    peer.set_kv_cache(room.rows, max_seq_length=room.positions, device=weight.device, dtype=weight.dtype)

    def to(dtype: torch.dtype) -> None:
        peer.to(dtype)
        peer.set_kv_cache(room.rows, max_seq_length=room.positions, device=weight.device, dtype=dtype)

    step = quiet(torch.compile(peer, dynamic=False)) if compiled else peer

    def forward(call: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        return call(ids, input_pos=positions), positions[-1:] + 1

    def prefill(ids: Tensor) -> tuple[Tensor, Any]:
        return forward(peer, ids, torch.arange(ids.shape[1], device=ids.device))

    return Rival(
        prefill,
        lambda ids, position: forward(step, ids, position),
        same_weights=True,
        to=to,
        construct=lambda: package.GPT(settings),
    )


def _weights(model: DIYForCausalLM) -> dict[str, Tensor]:
    """Our state dict under litgpt's names."""
    weights: dict[str, Tensor] = {}
    for ours, weight in model.state_dict().items():
        name = ours
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if "gate_up_proj" in name:
            gate, up = weight.chunk(2)
            weights[name.replace("gate_up_proj", "fc_1")] = gate
            weights[name.replace("gate_up_proj", "fc_2")] = up
        else:
            weights[name] = weight
    return weights
