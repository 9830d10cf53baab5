"""What a module leaves behind when it moves to another device, found on machines that have no other.

Torch's meta device holds shapes and no numbers, and a call on it meets a tensor of another device as one on a GPU does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diymodel.verify.adapters import LM

META = "meta"
_REGISTERED = ("_parameters", "_buffers", "_modules")


def left_behind(lm: LM, ids: Tensor) -> list[str]:
    """The attributes whose tensors stay where they were when the module moves, and break a call there.

    What a call makes by itself on the CPU is not meant, such as a mask: it is no part of the module. Where a call
    cannot be made without numbers, as where experts are chosen by ``nonzero``, nothing is found.

    Args:
        lm: a module that was called before, for what it sets up then. It is of no use afterwards.
        ids: (B, T), any that it takes.
    """
    try:
        lm.module.to(META)
    except Exception:  # a stranger's module may raise anything
        return []
    if _runs(lm, ids):
        return []
    stayed = [
        (part, f"{prefix}.{name}".lstrip("."), name, value)
        for prefix, part in lm.module.named_modules()
        for name, value in vars(part).items()
        if name not in _REGISTERED and _moved(value) is not value
    ]
    for part, _, name, value in stayed:
        vars(part)[name] = _moved(value)
    if not _runs(lm, ids):
        return []
    found = []
    for part, path, name, value in stayed:
        vars(part)[name] = value
        if not _runs(lm, ids):
            found.append(path)
        vars(part)[name] = _moved(value)
    return found


@torch.no_grad()
def _runs(lm: LM, ids: Tensor) -> bool:
    try:
        with torch.device(META):
            lm.logits(ids.to(META))
    except Exception:  # a stranger's module may raise anything
        return False
    return True


def _moved(value: Any) -> Any:
    """The tensors in it moved; the very value where there are none."""
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, Mapping):
        items = {key: _moved(item) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in items) else value
    if type(value) in (list, tuple):
        moved = [_moved(item) for item in value]
        return type(value)(moved) if any(a is not b for a, b in zip(moved, value, strict=True)) else value
    return value
