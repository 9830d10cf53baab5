"""The bridge to a stranger's module: how it is called, and one interface over every convention.

Checks talk to an :class:`LM` and never to the module itself. What a module cannot do is recorded with the reason, and
the checks that need it are skipped with that reason. ``probing.py`` finds the :class:`Convention` by trying.

Shapes: B batch, T query length, S key length (cached + T), V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.failure import NotApplicable, SubjectError

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, T, V) and unshifted labels (B, T)
NewCache = Callable[
    [nn.Module, DIYConfig, int], Any
]  # module, config, rows -> an empty cache, or None if on the module
Shifted = Callable[
    [nn.Module, Tensor, int], Tensor
]  # module, ids (B, T), offset -> logits with every position + offset
Reference = Callable[[DIYConfig, Mapping[str, Tensor], Tensor], Tensor]  # config, state_dict, ids -> logits, float64

IGNORED = -100  # marks an unscored label between checks and LM, whatever the module's own ignore index is
_OUTPUTS = ("logits", "loss", "past_key_values", "presents", "cache")


@dataclass(frozen=True)
class Convention:
    """How a module is called; parameter names are None where ``forward`` has no such parameter."""

    ids: str
    mask: str | None = None  # (B, T), or (B, S) if mask_covers_cache; 1 for a real token
    lengths: str | None = None  # (B,): real tokens of each row, padding on the right
    left: str | None = None  # x-transformers' seq_start_pos (B,): padding tokens on the left of each row
    positions: str | None = None  # (B, T), or (T,) where the cache is on the module
    start: str | None = None  # Meta's Llama: how many tokens came before, an int
    past: str | None = None
    use_cache: str | None = None
    labels: str | None = None
    block_mask: str | None = None  # gpt-fast: the caller makes flex attention's causal mask
    mask_dtype: torch.dtype = torch.int64
    mask_covers_cache: bool = True
    labels_come_shifted: bool = False  # nanoGPT: targets[:, t] is the token after input_ids[:, t]
    ignore_index: int = IGNORED
    logits_need_labels: bool = False  # nanoGPT: without targets, logits of the last position only
    loss: Loss | None = None  # where the module leaves it to its caller
    new_cache: NewCache | None = None  # where the caller supplies the cache, or has it set up on the module
    cache_on_module: bool = False  # litgpt, gpt-fast: one timeline, nothing is handed back
    always_cached: bool = False  # gpt-fast, Meta's Llama: there is no call without the cache
    cached_extra: Mapping[str, Any] = field(default_factory=dict)  # further arguments of calls on a cache
    cache_is_value: bool = True  # lists, tuples and dicts of tensors; an object may change under its holder's hands
    shortest: int = 1  # tokens of an uncached call
    dtype: torch.dtype = torch.float64  # float32 where the module refuses float64
    missing: Mapping[str, str] = field(default_factory=dict)  # capability -> why the module does not have it


class Output(NamedTuple):
    """What a forward pass returned, by meaning."""

    logits: Tensor | None
    loss: Tensor | None
    past: Any


class Past(NamedTuple):
    """A cache as the module handed it back (None where it is on the module), and how many tokens it holds."""

    cache: Any
    length: int


class LM:
    """A built module and how to call it; all checks see the same interface."""

    def __init__(self, module: nn.Module, config: DIYConfig, convention: Convention) -> None:
        self.module = module
        self.config = config
        self.convention = convention

    def logits(self, input_ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole sequences without a cache; ``real`` (B, T) is False at padding."""
        convention = self.convention
        if convention.always_cached:
            return self._extend(input_ids, None, real)[0]
        inputs = self._inputs(input_ids, real, start=0)
        if convention.logits_need_labels:
            inputs[_some(convention.labels)] = input_ids
        return self._shaped(self._call(inputs).logits)

    @torch.no_grad()
    def extend(self, input_ids: Tensor, past: Past | None = None, real: Tensor | None = None) -> tuple[Tensor, Past]:
        """Logits (B, T, V) of new tokens on a cache (None: the first ones), and the cache that holds them too.

        ``real`` (B, S) is False at padding, over cached and new tokens alike.
        """
        return self._extend(input_ids, past, real)

    def copied(self, past: Past) -> Past:
        """The cache to go on with when another branch goes on with ``past``: a copy, unless it is a value."""
        return past if self.convention.cache_is_value else past._replace(cache=copy.deepcopy(past.cache))

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The subject's own loss; ``labels`` (B, T) are unshifted, with IGNORED where they are not scored."""
        convention = self.convention
        if convention.loss is not None:
            return convention.loss(self.logits(input_ids), labels)
        output = self._call({convention.ids: input_ids, _some(convention.labels): self.own_labels(labels)})
        if output.loss is None:
            raise SubjectError(f"forward({convention.labels}=…) returned no scalar loss")
        return output.loss

    def own_labels(self, labels: Tensor) -> Tensor:
        """Unshifted labels as the module wants them: shifted if it does not shift, with its own ignore index."""
        if self.convention.labels_come_shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels.masked_fill(labels == IGNORED, self.convention.ignore_index)

    def embedding(self) -> nn.Embedding:
        """The token embedding.

        Raises:
            NotApplicable: none is found.
        """
        tables = [part for part in self.module.modules() if isinstance(part, nn.Embedding)]
        vocab_size = self.config.vocab_size
        exact = [table for table in tables if table.num_embeddings == vocab_size]
        for table in exact or [table for table in tables if table.num_embeddings > vocab_size]:
            return table
        raise NotApplicable("no nn.Embedding with a row for every token was found")

    def _extend(self, input_ids: Tensor, past: Past | None, real: Tensor | None) -> tuple[Tensor, Past]:
        convention = self.convention
        cache, start = past or (None, 0)
        if past is None and convention.new_cache is not None:
            cache = convention.new_cache(self.module, self.config, input_ids.shape[0])
        inputs = {**self._inputs(input_ids, real, start), **convention.cached_extra}
        if cache is not None:
            inputs[_some(convention.past)] = cache
        if convention.use_cache:
            inputs[convention.use_cache] = True
        if convention.cache_on_module and convention.positions:
            inputs[convention.positions] = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        output = self._call(inputs)
        if not convention.cache_on_module:
            cache = output.past if output.past is not None else cache
            if cache is None:
                raise NotApplicable("forward returned no cache")
        return self._shaped(output.logits), Past(cache, start + input_ids.shape[1])

    def _inputs(self, input_ids: Tensor, real: Tensor | None, start: int) -> dict[str, Any]:
        """The arguments of a call without those for the cache; ``start`` tokens came before."""
        convention, T = self.convention, input_ids.shape[1]
        inputs: dict[str, Any] = {convention.ids: input_ids}
        if convention.start:
            inputs[convention.start] = start
        if convention.block_mask:
            inputs[convention.block_mask] = _causal_block_mask(self.module, T, start)
        if real is None:
            return inputs
        if convention.lengths:
            return inputs | {convention.lengths: real[:, -T:].sum(1)}
        if convention.left and not bool(real[:, 0].all()):
            return inputs | {convention.left: (~real).long().cumprod(1).sum(1)}
        covered = real if convention.mask_covers_cache else real[:, -T:]
        inputs[_some(convention.mask)] = covered.to(convention.mask_dtype)
        if convention.positions:
            inputs[convention.positions] = (real.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        return inputs

    def _shaped(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise SubjectError(
                "forward returned no logits: expected a tensor (batch, seq, vocab), or a tuple, dict or object with one"
            )
        return logits[..., : self.config.vocab_size]  # litgpt and others pad the vocabulary

    def _call(self, inputs: Mapping[str, Any]) -> Output:
        return read_output(self.module(**inputs), self.config.vocab_size)


def _causal_block_mask(module: nn.Module, T: int, start: int) -> Any:
    """flex attention's mask of T queries over the module's whole cache; gpt-fast shifts it by the position itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, 1, 1, T, module.max_seq_length, device="cpu")  # type: ignore[arg-type]


def own_model() -> dict[str, Any]:
    """Our own model, as arguments of a Subject; this is the one place of the harness that knows it."""
    from diymodel.cache import Span
    from diymodel.loss import next_token_loss
    from diymodel.model import DIYForCausalLM
    from diymodel.verify.reference import reference_logits

    def shifted(module: nn.Module, input_ids: Tensor, offset: int) -> Tensor:
        assert isinstance(module, DIYForCausalLM)
        T = input_ids.shape[1]
        module.model.rotary(Span.after(offset, offset, T, None), module.lm_head.weight)  # a table that is long enough
        hidden, _ = module.model.run(input_ids, None, None, Span.after(offset, 0, T, None), None)
        logits: Tensor = module.lm_head(hidden)
        return logits

    return {
        "factory": DIYForCausalLM,
        "loss": next_token_loss,
        "shifted": shifted,
        "reference": reference_logits,
    }


def read_output(output: Any, vocab_size: int) -> Output:
    """Find logits, loss and cache in what a forward pass returned: tensor, tuple, dict or object."""
    if isinstance(output, Tensor):
        items: Iterable[Any] = (output,)
    elif isinstance(output, Mapping) or hasattr(output, "logits"):
        found = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in _OUTPUTS}
        past = next((found[name] for name in _OUTPUTS[2:] if found.get(name) is not None), None)
        return Output(found.get("logits"), found.get("loss"), past)
    elif isinstance(output, (tuple, list)):
        items = output
    else:
        raise SubjectError(
            f"forward returned {type(output).__name__}: expected logits, or a tuple, dict or object with them"
        )
    logits = loss = past = None
    for item in items:
        if isinstance(item, Tensor) and item.dim() == 0:
            loss = item
        elif logits is None and isinstance(item, Tensor) and item.dim() >= 2 and item.shape[-1] >= vocab_size:
            logits = item
        elif past is None:
            past = item
    return Output(logits, loss, past)


def _some(name: str | None) -> str:
    assert name is not None, "a check asked for what the module does not have: its `needs` are incomplete"
    return name
