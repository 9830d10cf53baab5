"""What differs between the supported versions of torch, and nothing else does: every such difference is handled here.

The oldest version is the one that pyproject.toml names.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "COMPILES_PROPERTIES",
    "FUSED_DEVICES",
    "TORCH",
    "DispatchMode",
    "SDPBackend",
    "attention",
    "attention_backends",
    "autocasting",
    "compile_options",
    "cpu_has_bfloat16",
    "int8_linear",
    "is_compiling",
    "nan_where_undefined",
    "scores_fit",
    "sdpa_kernel",
    "unsafe_globals",
]


def parse_version(text: str) -> tuple[int, int]:
    """Major and minor: ``2.13.0+cpu`` and ``2.13.0a0`` are both (2, 13)."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


TORCH = parse_version(torch.__version__)

COMPILES_PROPERTIES = TORCH >= (2, 3)  # whether torch.compile follows properties of a module

FUSED_DEVICES = ("cpu", "cuda", "mps") if TORCH >= (2, 4) else ("cuda",)  # where AdamW has a fused kernel


class DispatchMode(TorchDispatchMode):
    """Sees every operation below autograd.

    Newer torch imports its compiler at the first of them, for seconds, to keep the mode out of what is compiled.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


if TYPE_CHECKING or TORCH >= (2, 3):
    from torch.compiler import is_compiling
    from torch.nn.attention import SDPBackend, sdpa_kernel
else:  # pragma: no cover - 2.2 has the same under other names
    from torch._utils import is_compiling
    from torch.backends.cuda import SDPBackend, sdp_kernel

    @contextlib.contextmanager
    def sdpa_kernel(backends: SDPBackend) -> Iterator[None]:
        """Attention by this backend alone."""
        with sdp_kernel(
            enable_flash=backends == SDPBackend.FLASH_ATTENTION,
            enable_math=backends == SDPBackend.MATH,
            enable_mem_efficient=backends == SDPBackend.EFFICIENT_ATTENTION,
        ):
            yield


@contextlib.contextmanager
def nan_where_undefined() -> Iterator[None]:
    """``torch.empty`` gives NaN and not whatever lies in memory, as under ``torch.use_deterministic_algorithms``.

    That function imports the compiler as well, which takes seconds.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AVX512-BF16); False where this torch cannot tell."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


# Linear on a CPU: (rows, in) bfloat16, (out, in) int8, (out,) bfloat16 -> (rows, out). None: not in this torch.
int8_linear: Callable[[Tensor, Tensor, Tensor], Tensor] | None = (
    getattr(torch, "_weight_int8pack_mm", None) if TORCH >= (2, 4) else None
)


def autocasting(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for this type of device."""
    if TORCH >= (2, 4):
        return torch.is_autocast_enabled(device_type)
    return bool(torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled())


def compile_options(device_type: str) -> dict[str, Any]:
    """What ``torch.compile`` is told about a step that the caller guards and calls with the same shapes.

    From 2.8 on no guards are looked at, and on a CPU the kernels are called from C++.
    """
    options: dict[str, Any] = {}
    if TORCH >= (2, 8):
        options["guard_filter_fn"] = lambda guards: [False] * len(guards)
        if device_type == "cpu":
            options["cpp_wrapper"] = True
    return options


def attention_backends() -> tuple[SDPBackend, ...]:
    """Those that this torch knows, each of which may or may not run; cuDNN's is known from 2.4 on."""
    names = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
    return tuple(getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name))


if TYPE_CHECKING or TORCH >= (2, 5):

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """``F.scaled_dot_product_attention``: query (B, H, T, D), key and value (B, K, S, D), H a multiple of K."""
        return F.scaled_dot_product_attention(query, key, value, **options)

else:  # pragma: no cover - before 2.5, it knew no grouped queries

    def attention(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **options: Any) -> Tensor:
        """As above; each key and value is copied for the queries that share it."""
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(query, key, value, **options)


def scores_fit(run: Callable[[], object], limit: float) -> bool:
    """Whether the scores of torch's attention stay below ``limit`` in ``run``.

    Asked before 2.5, when it computed them in float16 if the rest is: what was larger overflowed. True from 2.5 on.
    """
    if TORCH >= (2, 5):
        return True
    with _Scores() as scores:
        run()
    return float(scores.largest) < limit


class _Scores(TorchFunctionMode):
    """Looks at the scores of every call of torch's attention."""

    largest = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = (tensor.detach().abs().amax() for tensor in args[:2])
            self.largest = max(self.largest, float(query * key) * args[0].shape[-1] ** 0.5)
        return func(*args, **(kwargs or {}))


def unsafe_globals(file: BinaryIO) -> list[str]:
    """The names in a file of ``torch.save`` that ``torch.load(weights_only=True)`` refuses to import.

    Raises:
        Exception: it is no such file; of which type depends on the version.
    """
    if TORCH >= (2, 6):
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return _unsafe_globals(file)


def _unsafe_globals(file: BinaryIO) -> list[str]:
    """As torch's own from 2.6 on."""
    from torch._weights_only_unpickler import _get_allowed_globals

    with zipfile.ZipFile(file) as archive:
        (data,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        if f"{data.removesuffix('data.pkl')}constants.pkl" in archive.namelist():
            raise ValueError("a TorchScript archive")  # which torch.load runs, before 2.6
        pickled = pickletools.genops(archive.read(data))
        names = {str(argument).replace(" ", ".") for opcode, argument, _ in pickled if opcode.name == "GLOBAL"}
    return sorted(names - _get_allowed_globals().keys())
