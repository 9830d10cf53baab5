"""The bridge to a stranger's module: one interface over every convention.

Checks talk to an :class:`LM` and never to the module itself.

Shapes: B batch, T query length, S key length (cached + T), V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.calling.arguments import of_tokens, on_a_cache, some
from diymodel.verify.calling.outputs import Output, joined, read_output, unflattened
from diymodel.verify.casting import cast
from diymodel.verify.convention import IGNORED, CachedEntry, Convention
from diymodel.verify.embeddings import Table, looked_up, tables_of
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, said

if TYPE_CHECKING:
    from diymodel.verify.calling.generating import Generating

Around = Callable[[int, int], AbstractContextManager[Any]]  # start, T: what each call of the module happens in

_APART = 2**20  # seeds of two calls that draw some of the rows each
_BY_TOKEN = ("ids", "labels", "documents", "positions")  # roles whose values are (B, T)


class Past(NamedTuple):
    """A cache as the module handed it back (None where it is on the module), and how many tokens it holds."""

    cache: Any
    length: int
    tokens: Tensor | None = None  # (B, length), where the next call gets them as well


class LM:
    """A module, or what builds it at its first use, and how to call it; all checks see the same interface."""

    def __init__(self, module: nn.Module | Callable[[], nn.Module], config: DIYConfig, convention: Convention) -> None:
        self._module = module
        self.config = config
        self.convention = convention
        self.keep_layout = False  # pass views as they are
        self.around: Around | None = None

    @functools.cached_property
    def module(self) -> nn.Module:
        return self._module if isinstance(self._module, nn.Module) else self._module()

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        tensors = itertools.chain(self.module.parameters(), self.module.buffers(), [torch.empty(0)])
        return next(tensors).device

    def logits(self, input_ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole sequences without a cache; ``real`` (B, T) is False at padding."""
        return self._each(
            input_ids, lambda end: self._logits(input_ids[:, :end], None if real is None else real[:, :end])
        )

    def _each(self, input_ids: Tensor, call: Callable[[int], Tensor]) -> Tensor:
        """Logits of all positions by a call on so many tokens, or on every prefix where the last ones alone come."""
        T = input_ids.shape[1]
        if not self.convention.last_only:
            return call(T)
        return torch.cat([call(end)[:, -1:] for end in range(1, T + 1)], 1)

    def _logits(self, input_ids: Tensor, real: Tensor | None) -> Tensor:
        """As :meth:`logits`, of as many positions as the module gives."""
        convention = self.convention
        if (lacking := convention.shortest - input_ids.shape[1]) > 0:  # what stands behind is nothing to a causal model
            longer = None if real is None else F.pad(real, (0, lacking), value=True)
            return self._logits(F.pad(input_ids, (0, lacking)), longer)[:, :-lacking]
        if convention.always_cached and convention.one_row and len(input_ids) > 1:
            rows = range(len(input_ids))
            return torch.cat([self._logits(input_ids[[r]], None if real is None else real[[r]]) for r in rows])
        if convention.always_cached:
            call = self._extend if convention.trains_on_cache else self.extend
            return call(input_ids, None, real)[0]
        inputs = of_tokens(convention, self.module, input_ids, real, start=0)
        if convention.logits_need_labels:
            inputs[some(convention.labels)] = input_ids.contiguous()  # any will do, and nanoGPT flattens them by view
        return self._shaped(self._uncached(inputs))

    def placed(self, input_ids: Tensor, positions: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of whole sequences whose tokens stand at ``positions`` (B, T)."""
        return self._told(input_ids, self.convention.positions, positions, real)

    def packed(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        """Logits (B, T, V) of rows that hold several documents; ``documents`` (B, T) numbers them from 1."""
        return self._told(input_ids, self.convention.documents, documents)

    def _told(self, input_ids: Tensor, name: str | None, values: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of a call with one more argument, a value a token."""

        def call(end: int) -> Tensor:
            ids = input_ids[:, :end]
            seen = None if real is None else real[:, :end]
            inputs = of_tokens(self.convention, self.module, ids, seen, start=0) | {some(name): values[:, :end]}
            if self.convention.logits_need_labels:
                inputs[some(self.convention.labels)] = ids
            return self._shaped(self._uncached(inputs))

        return self._each(input_ids, call)

    @torch.no_grad()
    def extend(
        self,
        input_ids: Tensor,
        past: Past | None = None,
        real: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Past]:
        """Logits (B, T, V) of new tokens on a cache (None: the first ones), and the cache that holds them too.

        ``real`` (B, S) is False at padding, over cached and new tokens alike. The new ones stand at ``positions``
        (B, T); None: behind the cached ones.
        """
        return self._extend(input_ids, past, real, positions)

    def copied(self, past: Past) -> Past:
        """The cache to go on with when another branch goes on with ``past``: a copy, unless it is a value."""
        return past if self.convention.cache_is_value else past._replace(cache=copy.deepcopy(past.cache))

    def cast(self, dtype: torch.dtype, device: str | None = None) -> nn.Module:
        """The very module, converted."""
        return cast(self.module, dtype, device, buffers=not self.convention.buffers_stay)

    def twin(self) -> LM:
        """The same with a copy of the module.

        Raises:
            NotApplicable: it cannot be copied.
        """
        try:
            module = copy.deepcopy(self.module)
        except Exception as error:  # such as a loss that it keeps with its graph
            raise NotApplicable(f"the module cannot be copied: {said(error)}") from error
        return LM(module, self.config, self.convention)

    def called(self, **changes: Any) -> LM:
        """The very module, called another way: ``changes`` are fields of its :class:`Convention`."""
        other = LM(self.module, self.config, replace(self.convention, **changes))
        other.around = self.around
        return other

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Calls inside leave no trace on the module: they write to copies of all that it keeps beside parameters."""
        parts = list(self.module.modules())
        shared = {id(x): x for x in (*parts, *self.module.parameters())}
        before = [dict(part.__dict__) for part in parts]
        for part, kept in zip(parts, before, strict=True):
            for name in kept.keys() - {"_parameters", "_modules"}:
                with suppress(Exception):  # what cannot be copied, such as a graph, is left as it is
                    part.__dict__[name] = copy.deepcopy(kept[name], shared)
        try:
            yield
        finally:
            for part, kept in zip(parts, before, strict=True):
                part.__dict__.clear()
                part.__dict__.update(kept)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The subject's own loss; ``labels`` (B, T) are unshifted, with IGNORED where they are not scored.

        A term that it holds beside the cross-entropy is measured with other labels at every place, and subtracted.
        """
        loss = self.own_loss(input_ids, self.own_labels(labels))
        if not self.convention.loss_holds_term:
            return loss
        others = (labels.where(labels != IGNORED, input_ids) + 1) % self.config.vocab_size
        return loss - self.beside_cross_entropy(input_ids, others).to(loss.dtype)

    def beside_cross_entropy(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """What the subject's own loss is more than the next-token cross-entropy of its logits, in float64."""
        logits, targets = self.logits(input_ids)[:, :-1].double(), labels[:, 1:].flatten()
        total = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        scored = (targets != IGNORED).sum().clamp(min=1)  # a row of one token has no next one
        return self.own_loss(input_ids, self.own_labels(labels)).double() - total / scored

    def own_loss(self, input_ids: Tensor, own_labels: Tensor, real: Tensor | None = None) -> Tensor:
        """The subject's own loss of labels as :meth:`own_labels` makes them; the very tensor is handed over."""
        convention = self.convention
        T = own_labels.shape[1]  # where none can be ignored, the last token has none
        input_ids, real = input_ids[:, :T], None if real is None else real[:, :T]
        if convention.loss is not None:
            return convention.loss(self.logits(input_ids, real), own_labels)
        inputs = of_tokens(convention, self.module, input_ids, real, start=0)
        if convention.loss_switch:
            if not own_labels.equal(input_ids):
                raise NotApplicable(f"forward({convention.loss_switch}=True) takes no labels but its ids")
            inputs[convention.loss_switch] = True
        else:
            inputs[some(convention.labels)] = own_labels
        loss = self._uncached(inputs).loss
        if convention.loss_attribute is not None:
            loss = attrgetter(convention.loss_attribute)(self.module)
        if not isinstance(loss, Tensor):
            raise SubjectError(f"forward({convention.loss_switch or convention.labels}=…) returned no scalar loss")
        return loss

    @property
    def generating(self) -> Generating:
        """How the module's own ``generate`` is called."""
        assert self.convention.generating is not None
        return self.convention.generating

    def generate(self, input_ids: Tensor, new_tokens: int, real: Tensor | None = None, **settings: Any) -> Tensor:
        """Prompts and what the module's ``generate`` puts after them; ``real`` (B, T) is False at padding.

        Args:
            settings: by role, such as ``temperature``, ``top_k``, ``eos``; what is not given is left to the module.
        """
        B, most = len(input_ids), self.generating.most_rows
        if most < B:
            further = settings | ({"seed": settings["seed"] + _APART} if "seed" in settings else {})
            rest = None if real is None else real[most:]
            first = self.generate(input_ids[:most], new_tokens, None if real is None else real[:most], **settings)
            return torch.cat((first, self.generate(input_ids[most:], new_tokens, rest, **further)))
        around: dict[str, Any] = {"context": self.config.max_seq_len, "device": input_ids.device}
        with self._without_cache():
            return self.generating.run(self.module, input_ids, new_tokens, real, {**around, **settings})

    def greedy(self, input_ids: Tensor, new_tokens: int, real: Tensor | None = None, **settings: Any) -> Tensor:
        """As :meth:`generate`, taking the likeliest token."""
        found = self.generate(input_ids, new_tokens, real, **{**self.generating.greedy, **settings})
        # Padding may be left out of what is returned, and so may the token that ends a row.
        return _with_new_tokens(found, input_ids) if real is None and "eos" not in settings else found

    def sample(self, input_ids: Tensor, new_tokens: int, seed: int, **settings: Any) -> Tensor:
        """As :meth:`generate`, drawing each token with a seed, at temperature 1."""
        found = self.generate(input_ids, new_tokens, seed=seed, **{**self.generating.sampling, **settings})
        return _with_new_tokens(found, input_ids)

    def own_labels(self, labels: Tensor) -> Tensor:
        """Unshifted labels as the module wants them: shifted if it does not shift, with its own ignore index."""
        if self.convention.labels_come_shifted and self.convention.labels_are_tokens:
            return labels[:, 1:]
        if self.convention.labels_come_shifted:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return labels.masked_fill(labels == IGNORED, self.convention.ignore_index)

    def embedding(self) -> Table:
        """The token embedding.

        Raises:
            NotApplicable: none is found.
        """
        tables, vocab_size = self.tables(), self.config.vocab_size
        exact = [table for table in tables if len(table.weight) == vocab_size]
        for table in exact or [table for table in tables if len(table.weight) > vocab_size]:
            return table
        raise NotApplicable(
            "no nn.Embedding, no class called so and no parameter with a row for every token, by its number, was found"
        )

    def tables(self) -> list[Table]:
        """Of tokens and positions; if no part is one of all tokens, parameters that a call looks rows up in too."""
        tables = tables_of(self.module)
        if any(len(table.weight) >= self.config.vocab_size for table in tables):
            return tables
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self.aside(), torch.no_grad():
            return [*tables, *looked_up(self.module, lambda: self.logits(ids))]

    def _extend(
        self, input_ids: Tensor, past: Past | None, real: Tensor | None, positions: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        convention, new = self.convention, input_ids.shape[1]
        if convention.one_at_a_time and new > 1:
            logits, past = self._extend(input_ids[:, :-1], past, None if real is None else real[:, :-1])
            last, past = self._extend(input_ids[:, -1:], past, real)
            return torch.cat((logits, last), 1), past
        cache, start, tokens = past or Past(None, 0)
        if past is None and convention.new_cache is not None:
            with self.device:  # as gpt-fast's callers make theirs
                cache = convention.new_cache(self.module, self.config, input_ids.shape[0])
        if convention.cached_gets_all:
            tokens = input_ids if tokens is None else torch.cat((tokens, input_ids), 1)
        inputs = on_a_cache(convention, self.module, input_ids, cache, start, tokens, real)
        if positions is not None:
            inputs[some(convention.positions)] = positions
        output = self._call(inputs, start, convention.cached_entry)
        if not convention.cache_on_module:
            cache = output.past if output.past is not None else cache
            if cache is None:
                raise NotApplicable("forward returned no cache")
            if convention.cache_is_new_part is not None and past is not None:
                cache = joined(past.cache, cache, convention.cache_is_new_part)
        logits = self._shaped(output)
        return logits[:, -new:] if convention.cached_gets_all else logits, Past(cache, start + new, tokens)

    def _shaped(self, output: Output) -> Tensor:
        if output.logits is None:
            V = self.config.vocab_size
            raise SubjectError(
                f"forward returned no logits but {output.instead}: expected a tensor (batch, seq, {V}) for "
                f"config.vocab_size={V}, or a tuple, dict or object with one"
            )
        return output.logits[..., : self.config.vocab_size]  # litgpt and others pad the vocabulary

    def _without_cache(self) -> AbstractContextManager[None]:
        installed = self.convention.installed
        return nullcontext() if installed is None else installed.removed(self.module)

    def _uncached(self, inputs: Mapping[str, Any]) -> Output:
        with self._without_cache():
            return self._call(inputs)

    def _call(self, inputs: Mapping[str, Any], start: int = 0, entry: CachedEntry | None = None) -> Output:
        if not self.keep_layout:  # how tensors lie in memory is the matter of one check only
            inputs = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        convention, ids = self.convention, self.convention.ids if entry is None else entry.ids
        T = inputs[ids].shape[1]
        if convention.sequence_first:
            by_token = {getattr(convention, role) for role in _BY_TOKEN} & inputs.keys()
            inputs = {**inputs, **{name: x.t().contiguous() for name in by_token if (x := inputs[name]).dim() == 2}}
        new = T - start if convention.cached_gets_all else T
        with nullcontext() if self.around is None else self.around(start, new):
            returned = self.module(**inputs) if entry is None else getattr(self.module, entry.name)(**inputs)
        paired = convention.past_values is not None
        output = read_output(returned, self.config.vocab_size, convention.loss_place, paired)
        if output.logits is None:
            return output
        logits = unflattened(output.logits, inputs[ids].shape, int(convention.sequence_first))
        return output._replace(logits=logits.transpose(0, 1) if convention.sequence_first else logits)


def _with_new_tokens(found: Tensor, prompt: Tensor) -> Tensor:
    """What generate returned, (B, L); where that is no more than the prompt, no property of new tokens holds."""
    L, T = found.shape[1], prompt.shape[1]
    if L <= T:
        raise CheckFailure(f"generate must add to a prompt of {T}, saw {L} tokens a row: see generation.keeps_prompt")
    return found


def own_model() -> dict[str, Any]:
    """Our own model, as arguments of a Subject; this is the one place of the harness that knows it."""
    from diymodel.cache import Span
    from diymodel.checkpoint import load_checkpoint, save_checkpoint
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
        "save": lambda module, path: save_checkpoint(path, module),
        "load": load_checkpoint,
    }
