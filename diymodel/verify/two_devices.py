"""A machine with a second device, pretended on one that has none.

Every tensor is on the CPU, and is said to be on the device or on the host. A GPU refuses most operations on tensors of
both. So does what is here, and it names the tensor that should not be on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diymodel.verify.failure import own_line
from diymodel.verify.held import tensors_in

_HOST, _DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # the same for torch, and unequal where they are compared
_DEVICE_OF = Tensor.device.__get__
_MOVES = ("to", "cpu", "cuda", "type_as")
# What takes tensors of both: an index comes from anywhere, and the others copy.
_ACROSS = (*_MOVES, "copy_", "__getitem__", "__setitem__", "index_put_")


class Apart(RuntimeError):
    """A GPU would refuse an operation, because of a tensor on the host; ``origin`` says where that came from."""

    def __init__(self, operation: str, origin: str) -> None:
        super().__init__(f"{operation} is given tensors on two devices, one of them {origin}")
        self.operation, self.origin = operation, origin


class TwoDevices(TorchFunctionMode):
    """Calls inside run as if the module and its inputs were on a GPU, and raise :class:`Apart` where that would break.

    Args:
        made: whether what a stranger's line makes without saying where is on the host, as torch has it.
    """

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.made = made
        self._host: dict[int, tuple[Tensor, str]] = {}  # by id; the tensor is held, so that no other gets its id
        self._asked = ""  # the origin of the tensor on the host that was last asked for its device

    def leave(self, tensors: Iterable[Tensor], origin: str) -> None:
        """Say that tensors are on the host."""
        self._host.update({id(tensor): (tensor, origin) for tensor in tensors})

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = tensors_in((args, kwargs))
        left = [self._host[id(tensor)] for tensor in given if id(tensor) in self._host]
        if function == _DEVICE_OF:
            real: torch.device = function(*args)
            if left and real.type == "cpu":
                self._asked = left[0][1]
                return _HOST
            return real if real.type != "cpu" else _DEVICE
        if len(left) < len(given) and name not in _ACROSS:
            for tensor, where_from in left:
                if tensor.dim():
                    raise Apart(name, where_from)
        result = function(*args, **kwargs)
        if name in _MOVES and isinstance(result, Tensor) and result is args[0]:
            result = result.view_as(result)  # a GPU's would be another tensor
        if origin := self._origin(name, args, kwargs, given, left):
            self.leave(tensors_in(result), origin)
        return result

    def _origin(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        left: list[tuple[Tensor, str]],
    ) -> str | None:
        """Why the result of a call is on the host; None: it is on the device.

        A device that a tensor on the host was asked for is the host. The name of the CPU is that of the device: it
        stands in a file for the best that there is, and is another one's on a machine with a GPU.
        """
        told = [kwargs["device"]] if kwargs.get("device") is not None else []
        if name == "to":
            told += [value for value in args if isinstance(value, (str, torch.device))]
        if told:
            return self._asked if told[0] is _HOST else None
        if name == "cpu":
            return f"moved there by {own_line()}" if self.made else None
        if name == "cuda":
            return None
        if given:
            return left[0][1] if len(left) == len(given) else None
        line = own_line() if self.made else None
        return line and f"made by {line}"
