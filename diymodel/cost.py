"""What a model costs, by formula from its configuration: parameters, FLOPs, KV bytes. Needs no torch.

A multiplication and the addition after it count as 2 FLOPs. Counted are the matrix products, as
``torch.utils.flop_counter.FlopCounterMode`` counts them under the math attention backend (the CPU flash kernel is not
registered there, and causality spares it half the attention of a prefill); norms, rotary positions and activations are
left out of both.

Shapes: B batch, T new positions, S key length, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from diymodel.config import DIYConfig


def num_parameters(config: DIYConfig) -> int:
    """Parameters, tied weights once."""
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return embedding + config.num_layers * _weights_per_block(config) + norms + head


def prefill_flops(config: DIYConfig, seq_len: int, batch_size: int = 1, logits_to_keep: int = 0) -> int:
    """FLOPs of one forward pass over ``seq_len`` positions without earlier ones: linear and quadratic in them.

    Args:
        logits_to_keep: positions whose logits are computed; 0 means all.
    """
    return _forward_flops(config, batch_size, seq_len, seq_len, logits_to_keep or seq_len)


def decode_flops(config: DIYConfig, position: int, batch_size: int = 1) -> int:
    """FLOPs of one cached decode step for the token at ``position`` (counted from 0): a constant plus O(position)."""
    return _forward_flops(config, batch_size, 1, position + 1, 1)


def kv_bytes_per_token(config: DIYConfig, bytes_per_value: int = 4) -> int:
    """Bytes that one position of a row takes in the KV cache; ``bytes_per_value``: 4 for float32, 2 for half types."""
    return 2 * config.num_layers * config.kv_heads * config.head_size * bytes_per_value


def _forward_flops(config: DIYConfig, B: int, T: int, S: int, kept: int) -> int:
    block = 2 * B * T * _weights_per_block(config)
    attention = 2 * 2 * B * config.num_heads * T * S * config.head_size  # queries by keys, weights by values
    head = 2 * B * kept * config.hidden_size * config.vocab_size
    return config.num_layers * (block + attention) + head


def _weights_per_block(config: DIYConfig) -> int:
    """Entries of a block's matrices."""
    attention = (2 * config.num_heads + 2 * config.kv_heads) * config.head_size
    return config.hidden_size * (attention + 3 * config.mlp_size)
