"""What a stranger's forward pass returned: its logits, loss and cache, told apart.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diymodel.verify.calling.signature import find_pair
from diymodel.verify.failure import SubjectError

_CACHES = ("past_key_values", "presents", "past", "cache", "kv_cache", "cache_params", "state")  # in an output
_CACHE = re.compile(r"cache|key_values|(^|_)(kv|past|presents?)(_|$)")  # in the name of one that is none of these


class Output(NamedTuple):
    """What a forward pass returned, by meaning."""

    logits: Tensor | None
    loss: Tensor | None
    past: Any
    instead: str = ""  # what came where there are no logits


def read_output(output: Any, vocab_size: int, loss_place: int = 0, paired: bool = False) -> Output:
    """Find logits, loss and cache in what a forward pass returned: tensor, tuple, dict or object.

    Args:
        loss_place: which of several scalars is the loss.
        paired: the cache is two things, keys and values.
    """
    if isinstance(output, Mapping) and "logits" not in output:
        output = tuple(output.values())
    if isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        output = next(filter(_holds_logits, output), output)  # Hyena returns an object in a tuple
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        own = (*getattr(output, "_fields", ()), *getattr(output, "__dict__", ()))  # of a named tuple, of an object
        found = (
            output
            if isinstance(output, Mapping)
            else {name: getattr(output, name, None) for name in ("logits", "loss", *_CACHES, *own)}
        )
        names = (*_CACHES, *filter(_CACHE.search, found))
        past = next((found[name] for name in names if found.get(name) is not None), None)
        if paired:
            pair = find_pair([name for name in found if found[name] is not None])
            past = pair and tuple(found[name] for name in pair)
        return Output(found["logits"], found.get("loss"), past)
    if not isinstance(output, (Tensor, tuple, list)):
        raise SubjectError(
            f"forward returned {type(output).__name__}: expected logits, or a tuple, dict or object with them"
        )
    items = [output] if isinstance(output, Tensor) else list(output)
    scalars = [item for item in items if isinstance(item, Tensor) and item.dim() == 0]
    loss = scalars[min(loss_place, len(scalars) - 1)] if scalars else None
    wide = [item for item in items if isinstance(item, Tensor) and item.dim() >= 2 and item.shape[-1] >= vocab_size]
    logits = next((item for item in wide if item.shape[-1] == vocab_size), wide[0] if wide else None)
    others = [item for item in items if item is not None and item is not logits and item is not loss]
    containers = [item for item in others if not isinstance(item, Tensor)]
    if paired:
        pasts = containers if len(containers) > 1 else others
        past = tuple(pasts[-2:]) if len(pasts) > 1 else None
    else:
        likely = filter(_is_of_layers, containers)  # beside containers, a tensor is one of hidden states
        past = next(likely, next(iter(containers or others), None))
    return Output(logits, loss, past, ", ".join(map(_told, items)) if logits is None else "")


def _is_of_layers(container: Any) -> bool:
    """Whether it may be a cache rather than what each layer computed: attention weights, hidden states."""
    return not isinstance(container, (list, tuple)) or not all(x is None or isinstance(x, Tensor) for x in container)


def _told(item: Any) -> str:
    if not isinstance(item, Tensor):
        return f"a {type(item).__name__}"
    return f"a tensor {tuple(item.shape)} of {str(item.dtype).removeprefix('torch.')}"


def _holds_logits(item: Any) -> bool:
    """Whether they stand in a dict or an object; what x-transformers returns beside them has a place for some."""
    found = item.get("logits") if isinstance(item, Mapping) else getattr(item, "logits", None)
    return isinstance(found, Tensor)


def unflattened(logits: Tensor, shape: torch.Size, batch: int) -> Tensor:
    """Logits of three dimensions where forward gave two: all positions in one, or the last ones only.

    Args:
        shape: of the token ids.
        batch: the dimension of the rows, 0 or 1.
    """
    if logits.dim() != 2:
        return logits
    if len(logits) == shape.numel():
        return logits.reshape(*shape, -1)
    return logits.unsqueeze(1 - batch) if len(logits) == shape[batch] else logits


def joined(old: Any, new: Any, dim: int) -> Any:
    """Nested containers with the tensors of two such, joined along a dimension."""
    if isinstance(old, Tensor):
        return torch.cat((old, new), dim)
    if isinstance(old, Mapping):
        return {name: joined(item, new[name], dim) for name, item in old.items()}
    if isinstance(old, (list, tuple)):
        items = [joined(*pair, dim) for pair in zip(old, new, strict=True)]
        return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)
    return old
