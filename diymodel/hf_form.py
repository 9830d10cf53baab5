"""Our configuration and weights in Hugging Face's names and files, and back.

The architecture is Llama's, so only the names differ, and two matrices: what we hold as one ``qkv_proj`` and one
``gate_up_proj`` (rows in the order q, k, v and gate, up) are separate matrices there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from diymodel.config import DIYConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

# Our field -> Hugging Face's. Llama has no residual dropout, so that one keeps a name of ours, which transformers
# carries along without using it.
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "dropout": "diymodel_dropout",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
}

# What transformers assumes where a config.json is silent. Mistral without a sliding window is the same architecture.
_LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "diymodel_dropout": 0.0,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}

# Parts of the Llama family that this model does not have: the one value under which they make no difference.
_ABSENT = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}


def config_to_hf(config: DIYConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a ``config.json`` that transformers opens as a ``LlamaForCausalLM``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.head_size,
        # Llama's defaults are tokens 1 and 2, which have no such meaning here.
        "bos_token_id": None,
        "eos_token_id": None,
        **{_HF_NAMES[field]: value for field, value in config.to_dict().items()},
    }


def config_from_hf(values: Mapping[str, Any]) -> DIYConfig:
    """Our configuration from the content of a ``config.json``; fields that do not change the model are ignored.

    Raises:
        ValueError: it describes a model that ours cannot be; names the field and its value.
        TypeError: a size is no number.
    """
    model_type = values.get("model_type")
    if model_type not in _DEFAULTS:
        _refuse("model_type", model_type, "the Llama family is llama, and mistral without a sliding window")
    values = {**_DEFAULTS[model_type], **values, "rope_theta": _rope_theta(values)}
    for name, harmless in _ABSENT.items():
        if values.get(name, harmless) != harmless:
            _refuse(name, values[name], f"only {harmless!r} is supported")
    for name in _HF_NAMES.values():
        if name not in values:
            raise ValueError(f"the field {name!r} is missing")
    if values["pad_token_id"] == -1:  # how the first Llama files say that there is none
        values["pad_token_id"] = None
    config = DIYConfig(**{field: values[name] for field, name in _HF_NAMES.items()})
    if values.get("head_dim") not in (None, config.head_size):
        head_dim = f"only hidden_size / num_attention_heads = {config.head_size} is supported"
        _refuse("head_dim", values["head_dim"], head_dim)
    window = values.get("sliding_window")
    if window is not None and window < config.max_seq_len:
        reason = f"attention here has no window; only null, or max_position_embeddings={config.max_seq_len} and more"
        _refuse("sliding_window", window, reason)
    return config


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """The rotary base, which transformers 4 writes like any field, and 5 in ``rope_parameters``."""
    found = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            _refuse(name, rope, "only the default rotary positions are supported")
        found[f"{name}.rope_theta"] = rope.get("rope_theta")
    found = {name: theta for name, theta in found.items() if theta is not None}
    if len(set(found.values())) > 1:
        raise ValueError("the rotary base is given twice: " + ", ".join(f"{name}={t!r}" for name, t in found.items()))
    return next(iter(found.values()), _LLAMA_DEFAULTS["rope_theta"])


def _refuse(name: str, value: object, reason: str) -> NoReturn:
    raise ValueError(f"{name}={value!r} is not a model that DIYForCausalLM can be: {reason}")


def weights_to_hf(state_dict: Mapping[str, Tensor], config: DIYConfig) -> dict[str, Tensor]:
    """Our state dict with Hugging Face's names, contiguous; a tied ``lm_head.weight`` is left out, as they do."""
    weights = dict(state_dict)
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    for name, parts in _fused(config):
        weights.update(zip(parts, torch.split(weights.pop(name), list(parts.values())), strict=True))
    return {name: weight.contiguous() for name, weight in weights.items()}


def weights_from_hf(weights: Mapping[str, Tensor], config: DIYConfig) -> dict[str, Tensor]:
    """The inverse of :func:`weights_to_hf`, for weights that are known to be complete."""
    state_dict = dict(weights)
    for name, parts in _fused(config):
        state_dict[name] = torch.cat([state_dict.pop(part) for part in parts])
    return state_dict


def _fused(config: DIYConfig) -> Iterator[tuple[str, dict[str, int]]]:
    """Each matrix of ours that Hugging Face holds in parts: its name, and the rows of each part by name."""
    q_rows, kv_rows = config.num_heads * config.head_size, config.kv_heads * config.head_size
    for layer in range(config.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        yield f"{attention}.qkv_proj.weight", {f"{attention}.{part}.weight": count for part, count in rows.items()}
        yield (
            f"{mlp}.gate_up_proj.weight",
            {f"{mlp}.{part}.weight": config.mlp_size for part in ("gate_proj", "up_proj")},
        )


def find_files(directory: Path) -> tuple[bytes, list[Path]]:
    """The bytes of ``config.json``, and the files that hold the weights."""
    if not directory.exists():
        raise FileNotFoundError(f"there is no directory {directory}")
    if not directory.is_dir():
        raise ValueError("is a file: load_checkpoint reads the single-file form")
    if not (directory / CONFIG).exists():
        raise ValueError(f"is no directory in Hugging Face form: it has no {CONFIG}")
    if (directory / WEIGHTS).exists():
        names = {WEIGHTS}
    elif (directory / INDEX).exists():
        index = parse_json((directory / INDEX).read_bytes(), INDEX)
        names = set(index.get("weight_map", {}).values())
    else:
        raise ValueError(f"has neither {WEIGHTS} nor {INDEX}; weights in other formats (*.bin, *.pth) are not read")
    for name in names:
        if Path(name).name != name or not (directory / name).exists():
            raise ValueError(f"{INDEX} names {name!r}, which is not a file of this directory")
    return (directory / CONFIG).read_bytes(), [directory / name for name in sorted(names)]


def read_weights(shards: list[Path]) -> dict[str, Tensor]:
    safetensors = import_safetensors()
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{shard.name} is damaged, or no safetensors file ({error})") from error
        if twice := weights.keys() & found.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is in {shard.name} and in an earlier file")
        weights |= found
    # Early Llama files hold the rotary frequencies too, which follow from the configuration.
    return {name: weight for name, weight in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def parse_json(content: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is damaged: it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} is not a JSON object")
    return values


def first_difference(there: bytes, here: bytes) -> str:
    """The first field in which two ``config.json`` differ."""
    old, new = parse_json(there, CONFIG), parse_json(here, CONFIG)
    for name in {**new, **old}:
        if old.get(name, "absent") != new.get(name, "absent"):
            return f"{name} is {old.get(name, 'absent')!r} there and {new.get(name, 'absent')!r} here"
    return f"{CONFIG} is laid out in another way"


def import_safetensors() -> Any:
    """safetensors, which only this form needs."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the Hugging Face form needs safetensors: pip install 'diymodel[hf]'") from error
    return safetensors
