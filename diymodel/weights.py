"""Whether weights are exactly those that a configuration asks for, and which of its fields explains a misfit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from diymodel.config import DIYConfig

# The configuration fields behind each dimension of a weight, by the last name before ".weight".
_HEADS = "num_heads, num_kv_heads, hidden_size"
_DIMENSIONS = {
    "embed_tokens": ("vocab_size", "hidden_size"),
    "lm_head": ("vocab_size", "hidden_size"),
    "qkv_proj": (_HEADS, "hidden_size"),
    "q_proj": ("hidden_size", "hidden_size"),
    "k_proj": (_HEADS, "hidden_size"),
    "v_proj": (_HEADS, "hidden_size"),
    "o_proj": ("hidden_size", "hidden_size"),
    "gate_up_proj": ("intermediate_size", "hidden_size"),
    "gate_proj": ("intermediate_size", "hidden_size"),
    "up_proj": ("intermediate_size", "hidden_size"),
    "down_proj": ("hidden_size", "intermediate_size"),
}
_LISTED = 12  # problems spelled out in one message


def check_state_dict(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: DIYConfig) -> None:
    """Refuse weights that are not exactly those of the configuration.

    Args:
        found: the weights; a tied ``lm_head.weight`` may be missing.
        wanted: names and shapes, as tensors that need no values.
        config: what ``wanted`` was made from, for the explanation.

    Raises:
        ValueError: lists the names that are missing, unexpected or misshapen, with the configuration field that
            explains each; or says that the dtypes are mixed, or not floating-point, or that there are no values.
    """
    if any(weight.is_meta for weight in found.values()):
        raise ValueError("the weights are on the meta device: they have shapes and no values")
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    has, may_have = found.keys() | optional, wanted.keys() | optional
    problems = [f"missing: {name}{_blame(name, found, config)}" for name in wanted if name not in has]
    problems += [f"unexpected: {name}{_blame(name, wanted, config)}" for name in found if name not in may_have]
    for name, weight in wanted.items():
        if name in found and found[name].shape != weight.shape:
            is_, needs = tuple(found[name].shape), tuple(weight.shape)
            problems.append(f"shape: {name} is {is_}, and must be {needs}{_fields(name, is_, needs)}")
    if problems:
        more = f"\n  … and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError("the weights do not fit the configuration:\n  " + "\n  ".join(problems[:_LISTED]) + more)
    check_tied(found, config)
    quantised = {name for name, weight in wanted.items() if weight.dtype == torch.int8}
    dtypes = Counter(
        weight.dtype for name, weight in found.items() if not (name in quantised and weight.dtype == torch.int8)
    )
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        listed = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
        raise ValueError(f"weights must all have one floating-point dtype; these are {listed}")


def check_tied(found: Mapping[str, Tensor], config: DIYConfig) -> None:
    """Refuse two different weights where the configuration ties them."""
    embedding, head = found.get("model.embed_tokens.weight"), found.get("lm_head.weight")
    if not config.tie_word_embeddings or embedding is None or head is None:
        return
    if not torch.equal(_bits(embedding), _bits(head)):
        raise ValueError(
            "lm_head.weight is not model.embed_tokens.weight: these weights come from a model with "
            "tie_word_embeddings=False, and the configuration has tie_word_embeddings=True"
        )


def _blame(name: str, others: Mapping[str, Tensor], config: DIYConfig) -> str:
    """The field that explains why only one side has ``name``, where there is one."""
    layer = re.match(r"model\.layers\.\d+\.", name)
    if layer and not any(other.startswith(layer[0]) for other in others):
        return f" (num_layers={config.num_layers})"
    if name == "lm_head.weight":
        return f" (tie_word_embeddings={config.tie_word_embeddings})"
    return ""


def _fields(name: str, is_: tuple[int, ...], needs: tuple[int, ...]) -> str:
    """The fields behind the dimensions that differ."""
    dimensions = _DIMENSIONS.get(name.split(".")[-2], ("hidden_size",))  # else a norm
    differing = {field for field, a, b in zip(dimensions, is_, needs, strict=False) if a != b}
    return f" ({', '.join(sorted(differing or set(dimensions)))})"


def _bits(weight: Tensor) -> Tensor:
    """The bytes of a weight, in which a NaN equals itself."""
    return weight.contiguous().view(torch.uint8)


def check_expected(config: DIYConfig, expected: DIYConfig | None) -> None:
    """Refuse a configuration that is not the expected one (None: any will do); names each field that differs."""
    if expected is None or expected == config:
        return
    found, wanted = config.to_dict(), expected.to_dict()
    differing = [f"{name}={found[name]!r}, expected {wanted[name]!r}" for name in wanted if found[name] != wanted[name]]
    raise ValueError(f"saved with another configuration: {'; '.join(differing)}")


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their own names, where a wrapper had put its own before each of them."""
    names = list(state_dict)
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state_dict.values(), strict=True))


def with_tied_head(state_dict: Mapping[str, Tensor], config: DIYConfig) -> dict[str, Tensor]:
    """The state dict with both names of a tied weight on one tensor, which ``torch.save`` then stores once."""
    if not config.tie_word_embeddings:
        return dict(state_dict)
    return {**state_dict, "lm_head.weight": state_dict["model.embed_tokens.weight"]}
