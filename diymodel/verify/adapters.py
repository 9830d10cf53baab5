"""The bridge to a stranger's module: how it is called is found by looking at ``forward`` and by trying it once.

Checks talk to an :class:`LM` and never to the module itself. What a module cannot do is recorded with the reason, and
the checks that need it are skipped with that reason.

Shapes: B batch, T query length, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.failure import NotApplicable, SubjectError

_NAMES = {
    "ids": ("input_ids", "idx", "tokens", "x", "inputs"),
    "mask": ("attention_mask", "mask"),
    "lengths": ("seq_lengths",),
    "past": ("past_key_values", "past", "cache", "kv_cache"),
    "use_cache": ("use_cache",),
    "labels": ("labels", "targets"),
}
Loss = Callable[[Tensor, Tensor], Tensor]

_OUTPUTS = ("logits", "loss", "past_key_values", "presents", "cache")


@dataclass(frozen=True)
class Convention:
    """How a module is called; parameter names are None where ``forward`` has no such parameter."""

    ids: str
    mask: str | None = None
    lengths: str | None = None
    past: str | None = None
    use_cache: str | None = None
    labels: str | None = None
    labels_come_shifted: bool = False  # nanoGPT: targets[:, t] is the token after input_ids[:, t]
    ignore_index: int = -100
    logits_need_labels: bool = False  # nanoGPT: without targets, logits of the last position only
    loss: Loss | None = None  # of logits and unshifted labels, where the module leaves it to its caller
    cache_is_value: bool = True  # lists, tuples and dicts of tensors; an object may change under its holder's hands
    missing: Mapping[str, str] = field(default_factory=dict)  # capability -> why the module does not have it


class Output(NamedTuple):
    """What a forward pass returned, by meaning."""

    logits: Tensor | None
    loss: Tensor | None
    past: Any


class LM:
    """A built module and how to call it; all checks see the same interface."""

    def __init__(self, module: nn.Module, config: DIYConfig, convention: Convention) -> None:
        self.module = module
        self.config = config
        self.convention = convention

    def logits(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole sequences without a cache; ``lengths`` (B,): real tokens, padding on the right."""
        inputs = {self.convention.ids: input_ids}
        if lengths is not None:
            inputs |= self._padding(input_ids, lengths)
        if self.convention.logits_need_labels:
            inputs[_some(self.convention.labels)] = input_ids
        return self._logits(inputs, input_ids.shape[1])

    def extend(self, input_ids: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, T, V) of new tokens on a cache (None: the first ones), and the cache that holds them too."""
        inputs: dict[str, Any] = {self.convention.ids: input_ids}
        if past is not None:
            inputs[_some(self.convention.past)] = past
        if self.convention.use_cache:
            inputs[self.convention.use_cache] = True
        output = self._call(inputs)
        if output.past is None:
            raise NotApplicable("forward returned no cache")
        return self._shaped(output.logits, input_ids.shape[1]), output.past

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The subject's own loss; ``labels`` (B, T) are unshifted, with -100 where they are not scored."""
        convention = self.convention
        if convention.loss is not None:
            return convention.loss(self.logits(input_ids), labels)
        if convention.labels_come_shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        labels = labels.masked_fill(labels == -100, convention.ignore_index)
        output = self._call({convention.ids: input_ids, _some(convention.labels): labels})
        if output.loss is None:
            raise SubjectError(f"forward({convention.labels}=…) returned no scalar loss")
        return output.loss

    def _padding(self, input_ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        if self.convention.lengths:
            return {self.convention.lengths: lengths}
        mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        return {_some(self.convention.mask): mask.to(torch.int64)}

    def _logits(self, inputs: dict[str, Any], length: int) -> Tensor:
        return self._shaped(self._call(inputs).logits, length)

    def _shaped(self, logits: Tensor | None, length: int) -> Tensor:
        if logits is None:
            raise SubjectError(
                "forward returned no logits: expected a tensor (batch, seq, vocab), or a tuple, dict or object with one"
            )
        return logits[..., : self.config.vocab_size]  # litgpt and others pad the vocabulary

    def _call(self, inputs: Mapping[str, Any]) -> Output:
        contiguous = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        return read_output(self.module(**contiguous), self.config.vocab_size)


def own_model() -> tuple[type[nn.Module], Loss]:
    """Our own model and its loss; this is the one place of the harness that knows them."""
    from diymodel.loss import next_token_loss
    from diymodel.model import DIYForCausalLM

    return DIYForCausalLM, next_token_loss


def read_output(output: Any, vocab_size: int) -> Output:
    """Find logits, loss and cache in what a forward pass returned: tensor, tuple, dict or object."""
    if isinstance(output, Tensor):
        items: Iterable[Any] = (output,)
    elif isinstance(output, Mapping) or hasattr(output, "logits"):
        found = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in _OUTPUTS}
        past = _first(found.get(name) for name in ("past_key_values", "presents", "cache"))
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


def parameter_names(module: nn.Module) -> dict[str, str]:
    """The names that ``forward`` gives to what :class:`Convention` knows.

    Raises:
        SubjectError: it takes no token ids.
    """
    parameters = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    found = {role: name for role, names in _NAMES.items() if (name := _first(n for n in names if n in parameters))}
    if not parameters:
        raise SubjectError("forward takes no arguments: expected forward(input_ids, …)")
    found.setdefault("ids", parameters[0])
    return found


def find_convention(module: nn.Module, config: DIYConfig) -> Convention:
    """Try a freshly built module once, in eval mode, and record how it wants to be called.

    Raises:
        SubjectError: it cannot be called with token ids, or returns no logits.
    """
    names: dict[str, Any] = {**parameter_names(module)}
    convention = Convention(**names)
    ids = torch.arange(2 * 4).view(2, 4) % config.vocab_size
    module.eval()
    with torch.no_grad():
        convention = _find_logits(module, config, convention, ids)
        missing = dict(_missing_padding(convention))
        missing |= _missing_loss(module, config, convention, ids)
        convention, without_cache = _find_cache(module, config, convention, ids)
        missing |= without_cache
    return replace(convention, missing=missing)


def _find_logits(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention:
    """All positions' logits come without labels, or, as in nanoGPT, only with them."""
    if convention.labels == "targets":
        convention = replace(convention, labels_come_shifted=True, ignore_index=-1)
    for need_labels in (False, True) if convention.labels else (False,):
        trial = replace(convention, logits_need_labels=need_labels)
        logits = _try(LM(module, config, trial).logits, ids)
        if logits.dim() == 3 and logits.shape[:2] == ids.shape:
            return trial
    raise SubjectError(
        f"forward({convention.ids}) of shape {tuple(ids.shape)} gave logits of shape {tuple(logits.shape)}: expected "
        f"({ids.shape[0]}, {ids.shape[1]}, {config.vocab_size})"
    )


def _missing_padding(convention: Convention) -> dict[str, str]:
    if convention.mask or convention.lengths:
        return {}
    return {"padding": "forward has no attention_mask and no seq_lengths"}


def _missing_loss(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> dict[str, str]:
    if not convention.labels:
        return {"loss": "forward has no labels"}
    output = LM(module, config, convention)
    try:
        output.loss(ids, ids)
    except SubjectError as error:
        return {"loss": str(error)}
    return {}


def _find_cache(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor
) -> tuple[Convention, dict[str, str]]:
    if not convention.past:
        return convention, dict.fromkeys(("cache", "chunks"), "forward has no past_key_values")
    lm = LM(module, config, convention)
    try:
        _, past = lm.extend(ids)
    except NotApplicable as error:
        return convention, {name: str(error) for name in ("cache", "chunks")}
    convention = replace(convention, cache_is_value=_is_value(past))
    try:
        LM(module, config, convention).extend(ids[:, :2], past)
    except Exception as error:  # whatever a stranger raises where one token at a time is all it supports
        return convention, {"chunks": f"several tokens on a cache are refused: {_first_line(error)}"}
    return convention, {}


def _is_value(past: Any) -> bool:
    """Whether a cache is built of containers and tensors only, which promise not to change once handed out."""
    if isinstance(past, Mapping):
        return all(_is_value(item) for item in past.values())
    if isinstance(past, (tuple, list)):
        return all(_is_value(item) for item in past)
    return past is None or isinstance(past, (Tensor, int, float))


def _try(call: Any, *arguments: Any) -> Tensor:
    try:
        result: Tensor = call(*arguments)
    except SubjectError:
        raise
    except Exception as error:  # a stranger's forward may raise anything
        raise SubjectError(f"forward failed on token ids: {type(error).__name__}: {_first_line(error)}") from error
    return result


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _first(items: Iterable[Any]) -> Any:
    return next((item for item in items if item is not None), None)


def _some(name: str | None) -> str:
    assert name is not None, "a check asked for what the module does not have: its `needs` are incomplete"
    return name
