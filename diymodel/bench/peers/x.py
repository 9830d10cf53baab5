"""x-transformers: the nearest it has to a Llama, in the same sizes and with weights of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diymodel.bench.peers.rival import Rival, Room, require
from diymodel.model import DIYForCausalLM


def x_transformers(model: DIYForCausalLM, room: Room, compiled: bool) -> Rival:
    """Pre-norm RMSNorm, rotary positions, SwiGLU, grouped queries, no biases; it turns neighbouring features."""
    package = require("x_transformers")
    require("loguru").logger.disable("x_transformers")  # advice on training
    config, weight = model.config, model.lm_head.weight

    def construct() -> Any:
        return package.TransformerWrapper(
            num_tokens=config.vocab_size,
            max_seq_len=config.max_seq_len,
            use_abs_pos_emb=False,
            attn_layers=package.Decoder(
                dim=config.hidden_size,
                depth=config.num_layers,
                heads=config.num_heads,
                attn_dim_head=config.head_size,
                attn_kv_heads=config.kv_heads,
                attn_flash=True,
                rotary_pos_emb=True,
                rotary_emb_dim=config.head_size,
                use_rmsnorm=True,
                ff_glu=True,
                ff_swish=True,
                ff_no_bias=True,
                ff_mult=config.mlp_size / config.hidden_size,
            ),
        )

    with torch.random.fork_rng(devices=[]):
        peer = construct().to(weight.device, weight.dtype).eval()

    def forward(ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        seen = ids if past is None else torch.cat((past[0], ids), 1)  # its cached call takes all tokens again
        cache = None if past is None else past[1]
        logits, cache = peer(seen, cache=cache, return_intermediates=True)
        return logits, (seen, cache)

    return Rival(lambda ids: forward(ids, None), forward, same_weights=False, to=peer.to, construct=construct)
