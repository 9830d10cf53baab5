"""Our configuration in transformers' words: the fields of hundreds of families that make a model small."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diymodel.config import DIYConfig

_WINDOW = 4  # positions that a sliding window sees: fewer than there are tokens in a trial
_EXPERTS = 4
_RANK = 4  # of the low-rank projections in multi-head latent attention

# What a family needs besides.
_FURTHER: dict[str, Callable[[DIYConfig], dict[str, Any]]] = {
    "codegen": lambda config: {"num_attention_heads": 4, "hidden_size": 4 * config.head_size},  # it splits them by 4
    "deepseek_v2": lambda config: {"num_key_value_heads": config.num_heads, "topk_method": "greedy"},
    "deepseek_v3": lambda config: {"num_key_value_heads": config.num_heads},
    "jamba": lambda config: {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 4},
    "bamba": lambda config: {
        "attn_layer_indices": [0],
        "mamba_n_heads": 2,
        "mamba_d_head": config.hidden_size,
        "mamba_d_state": 4,
    },
    "recurrent_gemma": lambda config: {"block_types": ["attention", "recurrent"]},
    "mamba2": lambda config: {"num_heads": 2, "head_dim": config.hidden_size, "chunk_size": 4, "n_groups": 1},
}


def sizes(config: DIYConfig, known: Any) -> dict[str, Any]:
    """The fields that set sizes, as far as the family ``known`` has them."""
    head, mlp = config.head_size, config.mlp_size
    names = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": head,
        "max_position_embeddings": config.max_seq_len,
        "query_pre_attn_scalar": head,  # Gemma's own scale
        "rotary_dim": head,  # GPT-J, CodeGen
        "qk_nope_head_dim": head,
        "qk_rope_head_dim": head,
        "v_head_dim": head,
        "kv_lora_rank": _RANK,
        "q_lora_rank": _RANK,
        "num_experts_per_tok": 2,
        "moe_topk": 2,
        "n_group": 1,
        "topk_group": 1,
        "state_size": 4,  # of state-space models
        "attention_hidden_size": config.hidden_size,  # RWKV
        **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), mlp),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), mlp),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _EXPERTS),
    }
    fields: dict[str, Any] = {name: value for name, value in names.items() if _has(known, name)}
    for name in ("sliding_window", "attention_chunk_size"):
        if isinstance(getattr(known, name, None), int):
            fields[name] = _WINDOW
    for name in ("layer_types", "layers_block_type", "no_rope_layers", "mlp_only_layers", "attention_layers"):
        if isinstance(kinds := getattr(known, name, None), (list, tuple)) and kinds and _has(known, name):
            fields[name] = _recut(list(kinds), config.num_layers)
    if isinstance(getattr(known, "attention_types", None), list):  # GPT-Neo's list of layers in short
        fields["attention_types"] = [[["global"], config.num_layers]]
    further = _FURTHER.get(known.model_type)
    return fields | further(config) if further else fields


def settings(config: DIYConfig, known: Any) -> dict[str, Any]:
    """The fields that set anything else, as far as the family ``known`` has them."""
    names = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "is_decoder": True,  # encoder families are causal only then
        **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    fields = {name: value for name, value in names.items() if _has(known, name)}
    rotary = getattr(known, "rope_parameters", None)
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        # All of the head, where a quarter of a tiny one would be no rotary position at all.
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in rotary else {}
        fields["rope_parameters"] = {**rotary, "rope_theta": config.rope_theta, **whole}
    return fields


def _has(known: Any, name: str) -> bool:
    """Whether the family has a field that can be set; some compute theirs from others."""
    own_name = known.attribute_map.get(name, name)
    return hasattr(known, name) and not isinstance(inspect.getattr_static(type(known), own_name, None), property)


def _recut(kinds: list[Any], num_layers: int) -> list[Any]:
    """What each of fewer layers is: the kinds in turn, so that the last layer is of the kind that the last one was."""
    distinct = list(dict.fromkeys(kinds[::-1]))  # from the last layer backwards
    return [distinct[i % len(distinct)] for i in range(num_layers)][::-1]
