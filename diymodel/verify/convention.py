"""How a stranger's module is called: the names of its parameters, and what it wants in them.

``calling/probing.py`` finds it by trying. What a module cannot do is recorded with the reason, and the checks that need
it are skipped with that reason.

Shapes: B batch, T query length, S key length (cached + T), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.calling.entries import Entry
from diymodel.verify.calling.installed import Installed
from diymodel.verify.calling.masks import CAUSAL_MASKS, CausalMask
from diymodel.verify.calling.signature import LABELS_SHIFTED

if TYPE_CHECKING:
    from diymodel.verify.calling.generating import Generating

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits (B, T, V) and unshifted labels (B, T)
# module, config, rows -> an empty cache, or None if on the module
NewCache = Callable[[nn.Module, DIYConfig, int], Any]

_PADDED = {"padding", "left_padding", "hiding", "generate_padded"}  # capabilities of a call with padding
IGNORED = -100  # marks an unscored label between checks and LM, whatever the module's own ignore index is

ROLES = (  # of forward's parameters: fields of Convention that name one
    "ids",
    "mask",
    "lengths",
    "left",
    "causal",
    "block_mask",
    "positions",
    "start",
    "past",
    "past_values",
    "use_cache",
    "new_tokens",
    "labels",
    "loss_switch",
    "documents",
)


@dataclass(frozen=True)
class CachedEntry:
    """A method that makes the calls on the cache in the place of ``forward``: its name, and those of its arguments."""

    name: str
    ids: str
    start: str  # how many tokens came before

    def arguments(self, input_ids: Tensor, start: int) -> dict[str, Any]:
        return {self.ids: input_ids, self.start: start}

    def __str__(self) -> str:
        return f"{self.name}({self.ids}, {self.start})"


@dataclass(frozen=True)
class Convention:
    """How a module is called; parameter names are None where ``forward`` has no such parameter."""

    ids: str
    mask: str | None = None  # (B, T), or (B, S) if mask_covers_cache; 1 for a real token, or at padding
    lengths: str | None = None  # (B,): real tokens of each row, padding on the right
    left: str | None = None  # x-transformers' seq_start_pos (B,): padding tokens on the left of each row
    pads_left: bool = False  # a row padded on the left was seen to give what it gives alone
    pads_left_untold: bool = False  # and without its positions: the mask says where each begins
    positions: str | None = None  # (B, T), or (T,) if positions_are_shared
    relative: bool = False  # which position a lone token has was seen to change nothing: only distances count
    start: str | None = None  # Meta's Llama: how many tokens came before, an int
    past: str | None = None
    past_values: str | None = None  # of the cached values, where past is of the keys alone: a cache is then such a pair
    use_cache: str | None = None
    labels: str | None = None
    loss_switch: str | None = None  # lucidrains' return_loss: asks for the loss of the ids, where no labels are taken
    documents: str | None = None  # (B, T): which document each token belongs to, where a row holds several
    causal: str | None = None  # (T, S): the caller makes the causal mask, as causal_mask says
    block_mask: str | None = None  # gpt-fast: the caller makes flex attention's causal mask
    new_tokens: str | None = None  # x-transformers' cache_age: how many of the tokens are not in the cache, an int
    sequence_first: bool = False  # torch's batch_first=False: tokens, labels and logits come as (T, B, …)
    causal_mask: CausalMask = CAUSAL_MASKS[0]
    mask_dtype: torch.dtype = torch.int64
    mask_marks_padding: bool = False  # torch's key_padding_mask: True at padding
    mask_covers_cache: bool = True
    mask_always: bool = False  # mask or lengths have no default
    positions_always: bool = False  # positions have no default
    positions_are_shared: bool = False
    labels_come_shifted: bool = False  # nanoGPT: targets[:, t] is the token after input_ids[:, t]
    ignore_index: int = IGNORED
    labels_are_tokens: bool = False  # a loss by hand that looks each label up: none can be ignored
    logits_need_labels: bool = False  # nanoGPT: without targets, logits of the last position only
    last_only: bool = False  # DeepSeek-V3: logits of the last position whatever is asked
    loss: Loss | None = None  # where the module leaves it to its caller
    loss_attribute: str | None = None  # llama2.c's last_loss: where the module leaves the loss, a path from it
    loss_place: int = 0  # which of the scalars that forward returns it is, where there are more, such as parts of it
    loss_holds_term: bool = False  # Mixtral: a balancing loss is added to the cross-entropy, in eval mode as well
    new_cache: NewCache | None = None  # where the caller supplies the cache, or has it set up on the module
    cache_on_module: bool = False  # litgpt, gpt-fast: nothing is handed back
    installed: Installed | None = None  # a method sets it up there; calls without a cache are made without it
    cached_entry: CachedEntry | None = None  # GRPO-Zero: forward is for training, and inference goes on with the cache
    one_row: bool = False  # a cache is of one row, and refuses more
    position_on_module: bool = False  # LLMs-from-scratch: the caller holds the cache, the module where it stands in it
    always_cached: bool = False  # gpt-fast, Meta's Llama: there is no call without the cache
    trains_on_cache: bool = False  # such a call carries gradients, and what it keeps hinders no later one
    extra: Mapping[str, Any] = field(default_factory=dict)  # further arguments of every call
    passed_over: tuple[str, ...] = ()  # optional parameters that nothing is known of
    cached_extra: Mapping[str, Any] = field(default_factory=dict)  # and of calls on a cache
    cache_is_new_part: int | None = None  # OpenAI's GPT-2: what comes back is of the new tokens, along this dimension
    cache_is_value: bool = True  # lists, tuples and dicts of tensors; an object may change under its holder's hands
    placed_on_cache: bool = False  # positions or start go with a cache only
    one_at_a_time: bool = False  # hkproj's pytorch-llama: a call on the cache refuses all but one token
    chunks_crash: bool = False  # several tokens on a cache are a mistake: one check says so, others add one at a time
    cached_gets_all: bool = False  # local-attention: the whole sequence stands beside its cache in each call
    shortest: int = 1  # tokens of an uncached call
    dtype: torch.dtype = torch.float64  # float32 where the module refuses float64
    buffers_stay: bool = False  # nanochat: forward asserts that its table of positions is bfloat16, as it was built
    padded_dtype: torch.dtype | None = None  # of calls with padding, where that overflows in dtype
    generating: Generating | None = None  # how the module's own generate is called; None: not yet found
    missing: Mapping[str, str] = field(default_factory=dict)  # capability -> why the module does not have it

    @property
    def one_timeline(self) -> bool:
        """Whether the module goes on with one sequence only, the last that was begun."""
        return self.cache_on_module or self.position_on_module

    def dtype_for(self, needs: Iterable[str]) -> torch.dtype:
        """In which a check is judged that needs so much."""
        return self.dtype if self.padded_dtype is None or _PADDED.isdisjoint(needs) else self.padded_dtype

    def describe(self) -> str:
        """How the module is called, in a line for its author."""
        call = f"forward({', '.join(name for role in ROLES if (name := getattr(self, role)))})"
        notes = [f"{name}={value}" for name, value in self.extra.items()]
        if self.buffers_stay:
            notes.append("in another dtype its buffers must stay in those that they were built in")
        if self.sequence_first:
            notes.append("tensors are (seq, batch)")
        if self.last_only:
            notes.append("logits are of the last position, so every prefix is a call of its own")
        if self.causal:
            notes.append(f"{self.causal} is a causal mask that the caller makes")
        if self.labels and "loss" not in self.missing:
            shifted = "come shifted by the caller" if self.labels_come_shifted else "are shifted inside the module"
            if self.labels in LABELS_SHIFTED and not self.labels_come_shifted:
                shifted += ", so its caller must not shift them"
            ignored = "none can be" if self.labels_are_tokens else f"{self.ignore_index} is"
            notes.append(f"{self.labels} {shifted}, {ignored} ignored")
        if self.loss_switch and "loss" not in self.missing:
            over = f", passing over token {self.ignore_index}" if self.ignore_index >= 0 else ""
            notes.append(f"{self.loss_switch} asks for the loss of the ids, shifted inside the module{over}")
        if self.loss_attribute:
            notes.append(f"the loss is left in {self.loss_attribute}")
        if self.loss_holds_term:
            notes.append("the loss holds a further term, the same for all labels, which the checks subtract")
        if "cache" not in self.missing:
            kind = "on the module" if self.cache_on_module else "a value" if self.cache_is_value else "a mutable object"
            more = ", the position in it on the module" if self.position_on_module else ""
            more += f", set up by {self.installed.by}" if self.installed else ""
            more += f", and calls on it are {self.cached_entry}" if self.cached_entry else ""
            if self.placed_on_cache:
                more += f", beside which {self.start or self.positions} says where new tokens stand"
            more += ", to which the caller adds what comes back" if self.cache_is_new_part is not None else ""
            more += ", beside which the whole sequence is given" if self.cached_gets_all else ""
            more += "".join(f", with {name}={value}" for name, value in self.cached_extra.items())
            more += ", and every call is on it" if self.always_cached else ""
            more += ", of one row" if self.one_row else ""
            notes.append(f"the cache is {kind}{more}{', one token at a time' if self.one_at_a_time else ''}")
        if passed_over := [name for name in self.passed_over if name not in {**self.extra, **self.cached_extra}]:
            notes.append(f"not given: {', '.join(passed_over)}")
        if self.generating and "generate" not in self.missing and self.generating.entry != Entry():
            notes.append(f"it generates by {self.generating.entry}")
        return "; ".join([call, *notes])
