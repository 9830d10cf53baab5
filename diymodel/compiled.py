"""The cached step of ``generate(compile=True)``: compiled once for a number of rows, run for every token.

A compiler wants shapes that stay. So the keys and values lie in buffers of a fixed capacity, one new token a row is
written at a position that is data, and what is not filled yet is masked. On a CPU a step attends to the filled slots
only, rounded up, their number being the one size that varies; on CUDA it attends to all, so that one CUDA graph
serves every step. The blocks are the model's own.

Shapes: B rows, C capacity, S slots attended to, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import types
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diymodel._compat import SDPBackend, autocasting, compile_options, sdpa_kernel
from diymodel.cache import FixedSlots, PastKeyValues

_SMALLEST_CAPACITY = 128
_SLOTS = 32  # a CPU step attends to a multiple of so many
_numbers = itertools.count()
_KEPT = 4  # compiled steps of one model; each holds its buffers


class CompiledDecoder(nn.Module):
    """One more token for every row of a batch, on keys and values in buffers of fixed size.

    Args:
        model: a :class:`diymodel.DIYForCausalLM` in eval mode.
        rows: B.
        capacity: C, positions that the buffers hold.
    """

    positions: Tensor  # (B,), of the token that comes next
    slots: Tensor  # (C,)
    table: Tensor  # (2, C, D), cosines and sines

    def __init__(self, model: Any, rows: int, capacity: int) -> None:
        super().__init__()
        config, like = model.config, model.model.embed_tokens.weight
        self.model = model
        shape = (rows, config.kv_heads, capacity, config.head_size)
        self.layers: list[dict[str, Tensor]] = []
        for layer in range(config.num_layers):
            for name in ("k", "v"):
                self.register_buffer(f"{name}{layer}", like.new_zeros(shape))
            self.layers.append({name: getattr(self, f"{name}{layer}") for name in ("k", "v")})
        self.register_buffer("positions", torch.zeros(rows, dtype=torch.int64, device=like.device))
        self.register_buffer("slots", torch.arange(capacity, device=like.device))
        self.register_buffer("table", model.model.rotary.make_table(capacity, like))
        self.filled = 0  # the largest position
        self.varying = like.device.type == "cpu"
        # One less than all at most: a size that may be all of them is compiled a second time.
        sizes = [min(size, capacity - 1) for size in range(_SLOTS, capacity + 1, _SLOTS)]
        self._looked_at = [self.slots.narrow(0, 0, size) for size in sizes]
        torch._dynamo.mark_dynamic(self._looked_at[0], 0)  # with which it is compiled
        # Each decoder has code of its own, by a name of its own: torch counts compilations by code and gives up at the
        # eighth, and by name it remembers what differed, such as another model's eps, to compile for any.
        code = _one_token.__code__.replace(co_name=f"compiled_step_{next(_numbers)}")
        step = types.FunctionType(code, _one_token.__globals__)
        # dynamic=False: nothing varies but what is marked.
        self._run: Callable[..., Tensor] = torch.compile(
            step, fullgraph=True, dynamic=False, options=compile_options(like.device.type)
        )
        self._replay: Callable[[Tensor], Tensor] | None = None  # on CUDA, once it is warm

    def start(self, past: PastKeyValues, longest: int) -> None:
        """Begin behind a prompt: ``past`` is its cache, ``longest`` the largest position in it."""
        for buffers, (cached, cached_pos) in zip(self.layers, past, strict=True):
            for name, buffer in buffers.items():
                buffer.zero_()  # what is masked is multiplied by 0, and a NaN of an earlier generation would stay one
                buffer.narrow(2, 0, cached[name].shape[2]).copy_(cached[name])
            self.positions.copy_(torch.as_tensor(cached_pos))
        self.filled = longest

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, 1, V) after one more token a row, (B, 1). They are valid until the next step."""
        self.filled += 1
        tokens = tokens.contiguous()  # as it was compiled for
        if self._replay is not None:
            return self._replay(tokens)
        if not self.varying:
            return self._run(self, tokens, self.slots)
        return self._run(self, tokens, self._looked_at[(self.filled - 1) // _SLOTS])

    def warm_up(self) -> None:
        """Compile."""
        tokens = torch.zeros(len(self.positions), 1, dtype=torch.int64, device=self.positions.device)
        # Of the kinds of attention, on a CPU the one that is compiled into what is around it. It is chosen here, once.
        # On CUDA that one computes in float32, by many kernels.
        attention = sdpa_kernel(SDPBackend.MATH) if self.varying else contextlib.nullcontext()
        with warnings.catch_warnings(), attention:
            warnings.simplefilter("ignore")  # the compiler's own: of how it might have done better
            self.step(tokens)
            if not self.varying:
                self._replay = captured(lambda tokens: self._run(self, tokens, self.slots), tokens)


def captured(step: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """A step as a CUDA graph: one launch in place of hundreds.

    Args:
        step: of tensors alone; what else it reads and writes must stay where it is.
        inputs: such as it will be given.

    Returns:
        The step; what it returns is valid until the next call.
    """
    with torch.inference_mode(False):  # or nobody could write to them without
        kept = [given.clone() for given in inputs]
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lazy initialisation is no part of the graph
        for _ in range(3):
            step(*kept)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*kept)

    def replay(*given: Tensor) -> Tensor:
        for own, new in zip(kept, given, strict=True):
            own.copy_(new)
        graph.replay()
        return result

    return replay


def _one_token(decoder: CompiledDecoder, tokens: Tensor, slots: Tensor) -> Tensor:
    """What is compiled: ``slots`` (S,) counts from 0, and is as long as the part of the buffers that is looked at."""
    model, positions = decoder.model, decoder.positions
    hidden = model.model.embed_tokens(tokens)
    cos, sin = decoder.table[:, positions][:, :, None, None].unbind()  # each (B, 1, 1, D)
    mask = (slots <= positions[:, None])[:, None, None]  # (B, 1, 1, S)
    past = [(buffers, positions) for buffers in decoder.layers]
    hidden, _ = model.model.run_layers(hidden, cos, sin, mask, FixedSlots(positions, slots.shape[0]), past)
    logits: Tensor = model.lm_head(hidden)
    positions.add_(1)
    return logits


class _Kept(dict[Hashable, CompiledDecoder]):
    """A model's compiled steps by what they were compiled for. A copy of the model begins with none."""

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, ()


@contextlib.contextmanager
def compiled_decoder(model: Any, rows: int, length: int) -> Iterator[CompiledDecoder]:
    """The decoder for ``rows`` of up to ``length`` positions: one that an earlier call compiled, or else a new one.

    It is nobody else's until the end: a generation within a generation, or in another thread, compiles its own.

    Args:
        model: in eval mode.

    Raises:
        ValueError: it cannot be compiled here, with the reason.
    """
    device = model.model.embed_tokens.weight.device.type
    if autocasting(device):
        raise ValueError("compile=True under torch.autocast: convert the model instead, as with model.bfloat16()")
    capacity = max(_SMALLEST_CAPACITY, 1 << length.bit_length())  # above length
    key = (rows, capacity, _fingerprint(model))
    kept: _Kept = vars(model).setdefault("_compiled", _Kept())
    decoder = kept.pop(key, None)
    if decoder is None or decoder.model is not model:  # a shallow copy shares what is kept
        decoder = _compile(model, rows, capacity)
    try:
        yield decoder
    finally:
        kept[key] = decoder
        while len(kept) > _KEPT:
            kept.pop(next(iter(kept)), None)


def _compile(model: Any, rows: int, capacity: int) -> CompiledDecoder:
    try:
        with torch.inference_mode(False), torch.no_grad():
            decoder = CompiledDecoder(model, rows, capacity)
        decoder.warm_up()
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, OSError, ImportError) as error:
        inner = getattr(error, "inner_exception", error)  # torch's own say at length that they wrap another
        lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
        raise ValueError(
            f"compile=True could not compile the step for {rows} rows and {capacity} positions: {type(inner).__name__}"
            f"{': ' + lines[0] if lines else ''}. It needs a C++ compiler on a CPU (g++ on the PATH, or named by CXX) "
            "and Triton on CUDA; compile=False needs neither"
        ) from error
    return decoder


def _fingerprint(model: nn.Module) -> Hashable:
    """All that compiled code depends on. The guards of torch would see a change too; looking at them at every step
    takes a third of a tiny model's time, so this is looked at once a generation. A CUDA graph goes on reading where the
    weights lay when it was captured.
    """
    parts: list[Hashable] = []
    for module in model.modules():
        settings = [(name, value) for name, value in vars(module).items() if type(value) in (bool, int, float, str)]
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        own = (*module._parameters.items(), *module._buffers.items())
        tensors = [
            (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_cuda and tensor.data_ptr())
            for name, tensor in own
            if tensor is not None
        ]
        parts.append((type(module), type(module).forward, *settings, *hooks, *tensors))
    return tuple(parts)
