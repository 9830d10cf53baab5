"""What a module leaves behind when it moves to another device, found on machines that have no other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.held import tensors_in
from diymodel.verify.two_devices import Apart, TwoDevices

_REGISTERED = ("_parameters", "_buffers", "_modules")


def left_behind(lm: LM, ids: Tensor) -> list[str]:
    """The attributes whose tensors stay where they were when the module moves, and break a call there.

    What a call makes by itself on the CPU is not meant, such as a mask: it is no part of the module.

    Args:
        lm: a module that was called before, for what it sets up then. What it holds is as it was, but for what a call
            changes.
        ids: (B, T), any that it takes.
    """
    found: list[str] = []
    while (name := _breaks_on(lm, ids, found)) is not None:
        found.append(name)
    return found


@torch.no_grad()
def _breaks_on(lm: LM, ids: Tensor, taken: list[str]) -> str | None:
    """The first attribute that breaks a call where it alone stayed, and those that are ``taken`` moved; or None."""
    try:
        with TwoDevices(made=False) as devices:
            for name, tensors in _held(lm.module).items():
                if name not in taken:
                    devices.leave(tensors, name)
            lm.logits(ids)
    except Apart as apart:
        return apart.origin
    except Exception:  # a stranger's module may raise anything, and asks what a device is in its own way
        return None
    return None


def _held(module: nn.Module) -> dict[str, list[Tensor]]:
    """The attributes with tensors, by path, which ``module.to()`` passes over: it changes parameters in their place."""
    parameters = {id(parameter) for parameter in module.parameters()}
    found = {
        f"{prefix}.{name}".lstrip("."): [tensor for tensor in tensors_in(value) if id(tensor) not in parameters]
        for prefix, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in _REGISTERED
    }
    return {name: tensors for name, tensors in found.items() if tensors}
