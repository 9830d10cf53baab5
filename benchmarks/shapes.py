"""The shapes that are measured, and two models of the same weights: ours and transformers' ``LlamaForCausalLM``."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from diymodel import DIYConfig, DIYForCausalLM

LARGEST_LOGIT_DIFFERENCE = 1e-4  # float32; two correct implementations differ by about 5e-6, a wrong one by far more


def _shape(
    hidden_size: int, num_layers: int, num_heads: int, vocab_size: int, num_kv_heads: int | None = None
) -> DIYConfig:
    return DIYConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=4096,  # costs nothing until it is used
        dropout=0.0,
    )


SHAPES = {
    "T256": _shape(64, 2, 4, vocab_size=256),  # byte-level: the head is as small as the rest, only overhead is left
    "T": _shape(64, 2, 4, vocab_size=6400),
    "S": _shape(512, 8, 8, vocab_size=6400),
    "M": _shape(768, 12, 12, vocab_size=32000),
    "L": _shape(960, 32, 15, vocab_size=49152, num_kv_heads=5),
}


def parse_shapes(text: str) -> dict[str, DIYConfig]:
    """``"T,S"`` to configurations by name.

    Raises:
        ValueError: a name is no shape.
    """
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in names}


def build(config: DIYConfig, seed: int = 0) -> DIYForCausalLM:
    """Our model in eval mode; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DIYForCausalLM(config).eval()


def transformers_missing() -> str | None:
    """Why there is no peer to compare with; None where there is one."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def llama_config(config: DIYConfig) -> Any:
    """The same architecture in transformers' words.

    No token ends a text: ``generate`` then makes as many tokens as it is asked for, checks for no end, and has nothing
    to warn about.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=config.dropout,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def llama_like(model: DIYForCausalLM) -> Any:
    """A ``LlamaForCausalLM`` with copies of our model's weights, on its device and in its dtype, in eval mode."""
    from transformers import LlamaForCausalLM

    weight = model.lm_head.weight
    peer = LlamaForCausalLM(llama_config(model.config))
    peer.load_state_dict(llama_weights(model))
    return peer.to(weight.device, weight.dtype).eval()


def llama_weights(model: DIYForCausalLM) -> dict[str, Tensor]:
    """Our state dict under transformers' names: where we hold several matrices as one, they come apart."""
    config = model.config
    parts = {
        "qkv_proj": (
            ("q_proj", config.num_heads * config.head_size),
            ("k_proj", config.kv_heads * config.head_size),
            ("v_proj", config.kv_heads * config.head_size),
        ),
        "gate_up_proj": (("gate_proj", config.mlp_size), ("up_proj", config.mlp_size)),
    }
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        module = name.split(".")[-2]
        if module not in parts:
            weights[name] = weight
            continue
        rows = weight.split([size for _, size in parts[module]])
        for (part, _), piece in zip(parts[module], rows, strict=True):
            weights[name.replace(module, part)] = piece
    return weights


@torch.inference_mode()
def check_same_logits(model: DIYForCausalLM, peer: Any, length: int = 64) -> float:
    """The largest difference between the two models' logits, which must be small before a time means anything.

    Prefill and a cached step are both compared. Call it in float32: half types round differently in each model.

    Raises:
        ValueError: they differ by more than :data:`LARGEST_LOGIT_DIFFERENCE`.
    """
    ids = random_ids(model.config, 2, length, model.lm_head.weight.device)
    ours, past = model(ids[:, :-1], use_cache=True)
    last, _ = model(ids[:, -1:], past_key_values=past, use_cache=True)
    theirs = peer(input_ids=ids[:, :-1], use_cache=True)
    their_last = peer(input_ids=ids[:, -1:], past_key_values=theirs.past_key_values, use_cache=True)
    difference = float((torch.cat((ours, last), 1) - torch.cat((theirs.logits, their_last.logits), 1)).abs().max())
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise ValueError(
            f"the two models' logits differ by {difference:.2g}, more than {LARGEST_LOGIT_DIFFERENCE:g}: they do not "
            "compute the same thing, and comparing their times would mean nothing"
        )
    return difference


def random_ids(config: DIYConfig, batch_size: int, length: int, device: torch.device | str, seed: int = 1) -> Tensor:
    """(batch_size, length) tokens, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch_size, length), generator=generator).to(device)


def describe_shape(config: DIYConfig) -> dict[str, Any]:
    """The configuration, for a results file; ``max_seq_len`` and ``dropout`` are the benchmark's own."""
    return dataclasses.asdict(config)
