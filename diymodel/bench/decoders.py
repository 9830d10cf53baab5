"""Whatever decodes, behind one interface: our own model, and any subject of the harness.

Shapes: B batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.model import DIYForCausalLM
from diymodel.verify.adapters import LM
from diymodel.verify.convention import Convention
from diymodel.verify.failure import said
from diymodel.verify.held import tensors_in, tensors_on
from diymodel.verify.subject import OWN, Subject, resolve

_LAST_ONLY = ("logits_to_keep", "num_logits_to_keep")  # parameters of forward: logits of the last so many positions


class Decoder(Protocol):
    """A model in eval mode that continues token ids."""

    @property
    def module(self) -> nn.Module:
        """The model itself."""

    @property
    def is_value(self) -> bool:
        """Whether a cache may be continued several times; else it must be made again."""

    def whole(self, ids: Tensor) -> Tensor:
        """Logits (B, T or 1, V) of sequences (B, T) without a cache, those of the last position at least."""

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Logits (B, T or 1, V) of new tokens on a cache (None: an empty one), and the cache that holds them too."""


class OwnDecoder:
    """Our model, as its own ``generate`` calls it."""

    is_value = True

    def __init__(self, module: DIYForCausalLM) -> None:
        self.module = module

    def whole(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.module(ids, logits_to_keep=1)
        return logits

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        if past is not None and ids.shape[1] == 1:
            return self.module.decode_step(ids, past)
        logits, presents = self.module(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return logits, presents


class SubjectDecoder:
    """A stranger's module, called in its own convention.

    Where it can compute the logits of the last position alone, it does: a decode step needs no others.
    """

    def __init__(self, module: nn.Module, config: Any, convention: Convention) -> None:
        self.module = module
        self._lm = LM(module, config, convention)
        self._last: LM | None = None
        parameters = inspect.signature(module.forward).parameters
        keep = next((name for name in _LAST_ONLY if name in parameters), None)
        if keep is not None:
            self._last = LM(_With(module, {keep: 1}), config, convention)
        elif convention.logits_need_labels:  # as nanoGPT: without labels, those of the last position
            self._last = LM(module, config, dataclasses.replace(convention, logits_need_labels=False))
        self.is_value = convention.cache_is_value and not convention.cache_on_module

    def whole(self, ids: Tensor) -> Tensor:
        return (self._last or self._lm).logits(ids)

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        return self._lm.extend(ids, past)


class _With(nn.Module):
    """A module with one more argument in every call."""

    def __init__(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.arguments = arguments

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs, **self.arguments)


class Benched:
    """A subject of ``diymodel bench``: what builds its decoders, and why it cannot be measured with a cache.

    Args:
        spec: as ``diymodel verify`` takes it: a file or module and a name, ``hf:MODEL_TYPE``, a directory, or None for
            our own model.
        config: sizes to build it in; a directory has its own.

    Raises:
        SubjectError: there is no such subject, or it cannot be called.
    """

    def __init__(self, spec: str | Subject | None, config: DIYConfig) -> None:
        self._subject = resolve(spec)
        self.name = self._subject.name
        self.is_own = self.name == OWN
        self.fixed = self._subject.directory is not None
        self.config: Any = config if not self._subject.directory else self._subject.directory()[1]
        self.no_cache_reason = None if self.is_own else self._subject.missing("cache")
        self.always_cached = not self.is_own and self._subject.convention.always_cached
        self.called_as = "its own generate" if self.is_own else self._subject.describe()

    @property
    def longest(self) -> int:
        """Positions that it holds."""
        return int(self.config.max_seq_len)

    def decoder(self, device: torch.device, dtype: torch.dtype) -> Decoder:
        """A new decoder in eval mode; the global random state of the CPU is left alone.

        Raises:
            ValueError: the subject cannot be built in these sizes.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                module = self._build(device)
            except NotImplementedError as error:
                raise ValueError(f"{self.name} refuses the sizes {self.config}: {said(error)}; try --shape") from error
        module = module.to(device, dtype).eval()
        if isinstance(module, DIYForCausalLM):
            return OwnDecoder(module)
        return SubjectDecoder(module, self.config, self._subject.convention)

    def _build(self, device: torch.device) -> nn.Module:
        if self._subject.directory is not None:
            return copy.deepcopy(self._subject.directory()[0])  # which may be moved, and cast
        with torch.device("meta" if device.type == "meta" else "cpu"):
            return self._subject.build(self.config)


def random_ids(vocab_size: int, batch_size: int, length: int, device: torch.device, seed: int = 1) -> Tensor:
    """(batch_size, length) tokens, the same for the same seed on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(vocab_size, (batch_size, length), generator=generator, device="cpu").to(device)


@torch.no_grad()
def greedy(decoder: Decoder, prompt: Tensor, new_tokens: int, use_cache: bool) -> Tensor:
    """The prompt (B, T) and the likeliest tokens after it, (B, T + new_tokens): the plainest loop there is."""
    T = prompt.shape[1]
    tokens = torch.cat((prompt, prompt.new_zeros(prompt.shape[0], new_tokens)), 1)
    past: Any = None
    for end in range(T, T + new_tokens):
        if use_cache:
            logits, past = decoder.extend(tokens[:, :T] if past is None else tokens[:, end - 1 : end], past)
        else:
            logits = decoder.whole(tokens[:, :end])
        tokens[:, end] = logits[:, -1].argmax(-1)
    return tokens


def kv_bytes(module: nn.Module, past: Any) -> int | None:
    """Bytes of the keys and values that a cache holds; None where they cannot be found.

    Found are the floating-point tensors of at least three dimensions in nested lists, tuples, mappings and objects, or
    else in what the modules hold beside their parameters.
    """
    kept = _large(tensors_in(past)) or _large(tensors_on(module))
    return sum(tensor.nbytes for tensor in kept) or None


def _large(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each once, of those that may be keys or values."""
    once = {id(tensor): tensor for tensor in tensors}.values()
    return [tensor for tensor in once if tensor.is_floating_point() and tensor.dim() >= 3]
