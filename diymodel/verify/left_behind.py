"""What a module leaves behind when it moves to another device, found on machines that have no other.

Torch's meta device holds shapes and no numbers. A call that meets a tensor there beside one on the CPU breaks, as it
does where one of them is on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diymodel.verify.adapters import LM
from diymodel.verify.held import tensors_in

META = "meta"
_REGISTERED = ("_parameters", "_buffers", "_modules")
# What torch says where the module takes a tensor along by itself, or as a number: of no harm between real devices.
_ACROSS = ("to", "type_as", "copy_", "__getitem__", "__setitem__", "index_put_")  # what takes tensors of two devices
_TAKEN_ALONG = (
    "Cannot copy out of meta tensor",
    "item() cannot be called on meta tensors",
    "_local_scalar_dense",  # the same, of torch 2.2
    "can't convert meta device type tensor to numpy",
)


class _OneDevice(TorchFunctionMode):
    """Refuses tensors of two devices in one operation, as a GPU does; some of the meta device's let them pass."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = {tensor.device for tensor in tensors_in((args, kwargs)) if tensor.dim()}
        if len(devices) > 1 and getattr(function, "__name__", "") not in _ACROSS:
            raise RuntimeError(f"{function} is given tensors on {devices}")
        return function(*args, **kwargs)


class _Held(NamedTuple):
    """An attribute with tensors, which ``module.to()`` passes over."""

    part: nn.Module
    name: str
    path: str
    value: Any

    def put(self, value: Any) -> None:
        vars(self.part)[self.name] = value


def left_behind(lm: LM, ids: Tensor) -> list[str]:
    """The attributes whose tensors stay where they were when the module moves, and break a call there.

    What a call makes by itself on the CPU is not meant, such as a mask: it is no part of the module.

    Args:
        lm: a module that was called before, for what it sets up then. It is of no use afterwards.
        ids: (B, T), any that it takes.
    """
    suspects = [held.path for held in _held(lm.module) if _breaks_apart(lm, ids, held)]
    if not suspects:
        return []
    lm.module.to(META)  # where a few breaches are allowed, as between a GPU and an index on the CPU
    if _runs_there(lm, ids):  # what stayed is taken along by the call, if several things then all at once
        return []
    everything = _held(lm.module)
    for held in everything:
        held.put(_moved(held.value))
    if not _runs_there(lm, ids):  # it cannot be tried, as where experts are chosen by nonzero
        return suspects
    found = []
    for held in everything:
        if held.path in suspects:
            held.put(held.value)
            if not _runs_there(lm, ids):
                found.append(held.path)
            held.put(_moved(held.value))
    return found


def _held(module: nn.Module) -> list[_Held]:
    return [
        _Held(part, name, f"{prefix}.{name}".lstrip("."), value)
        for prefix, part in module.named_modules()
        for name, value in list(vars(part).items())
        if name not in _REGISTERED and _moved(value) is not value
    ]


@torch.no_grad()
def _breaks_apart(lm: LM, ids: Tensor, held: _Held) -> bool:
    """Whether a call breaks where these tensors alone are on another device than all else."""
    held.put(_moved(held.value))
    try:
        with _OneDevice():
            return lm.logits(ids).is_meta
    except Exception as error:  # a stranger's module may raise anything
        return not any(words in str(error) for words in _TAKEN_ALONG)
    finally:
        held.put(held.value)


@torch.no_grad()
def _runs_there(lm: LM, ids: Tensor) -> bool:
    try:
        with torch.device(META), _OneDevice():
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
