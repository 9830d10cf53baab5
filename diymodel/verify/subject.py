"""What a stranger hands over: something that builds a module from a configuration, and what is known about it."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel._compat import nan_where_undefined
from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM, own_model
from diymodel.verify.calling.building import ByNames
from diymodel.verify.calling.generate_probing import with_generating
from diymodel.verify.calling.generating import CAPABILITIES as GENERATING
from diymodel.verify.calling.own_sizes import find_own_sizes
from diymodel.verify.calling.probing import find_convention
from diymodel.verify.convention import Convention
from diymodel.verify.failure import SubjectError, said_where
from diymodel.verify.given import Checkpoint, Load, Reference, Save, Shifted
from diymodel.verify.importing import defined_at, import_named
from diymodel.verify.randomness import seeded
from diymodel.verify.strategies import configs
from diymodel.verify.surroundings import surroundings
from diymodel.verify.timing import OutOfTime, time_limit

OWN = "diymodel"  # how our own model is called
_PATIENCE = 60  # seconds, for finding out how a subject is called
_LARGE = 10**6  # parameters, of a module that was to be tiny

Factory = Callable[[Any], nn.Module]
OpenDirectory = Callable[[], tuple[nn.Module, Any, Sequence[str]]]  # the fields of Opened

# Tried in this order, untied and then tied, until the factory builds one: what it is called with for finding its
# convention.
_FIRST_SIZES = (
    {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "hidden_size": 8},  # so that no two sizes are the same
    {"num_layers": 1, "num_heads": 2, "hidden_size": 8},
    {"num_layers": 2, "num_heads": 1, "hidden_size": 8},
    {"num_layers": 2, "num_heads": 2, "hidden_size": 16},
    {"num_layers": 2, "num_heads": 4, "hidden_size": 64},
)
_SMALL = 8  # the least of these hidden sizes
_WIDTHS = ("hidden_size", "num_heads", "num_kv_heads")
_FIRST_LENGTH = 16  # and as many tokens in the vocabulary


CLAIMS = {  # promises that no trying can find
    "cache_value": "a cache never changes once it is returned",
    "cache_filled": "the cache object that is passed in is the one that is filled",
    "strict_context": "more than max_seq_len tokens are refused",
    "finite_loss": "with every label ignored the loss is 0, not NaN",
    "left_padding": "a row may be padded on the left",  # found as well, where it gives what it gives alone
    "small_init": "as constructed, all tokens are about equally likely",
    "meta_init": "it may be built on the meta device, given memory by to_empty(), and then loaded",
    "ragged_cache": "rows padded on the right go on from their own last token",
    "nan_contained": "a NaN that stands at padding reaches no real logit",
    "strict_generation": "generate refuses more than max_seq_len tokens, prompt and new ones, before the first",
    "generate_eval": "generate works in eval mode and puts every part back into its own mode",
}
_FOUND = (
    *(
        "cache",
        "chunks",
        "padding",
        "padded_cache",
        "right_padded_cache",
        "packing",
        "loss",
        "labels",
        "labelled_logits",
    ),
    *("rows", "cached_rows", "uncached_again", "gradient", "graph"),
    *GENERATING,
)
_OWN_CLAIMS = (
    "cache_value",
    "strict_context",
    "finite_loss",
    "nan_contained",
    "strict_generation",
    "generate_eval",
    "small_init",
    "meta_init",
)
_GIVEN = {
    "reference": "names no reference: Subject(…, reference=…)",
    "shifted": "does not say how to shift its positions: Subject(…, shifted=…)",
    "window": "has no sliding window: Subject(…, window=…)",
    "directory": "is no directory with saved weights",
    "checkpoint": "does not say how it is saved and loaded: Subject(…, save=…, load=…)",
}
_TRIED = ("cache", "loss", "generate")
_ERROR = re.compile(r"\w+(Error|Exception): ")
_PRESUMED = ("causal", "past_context")  # of every subject that does not say otherwise
_HIDING = "hiding"  # a token is hidden, by a mask or by where its row begins
_CAPABILITIES = (*CLAIMS, *_FOUND, *_GIVEN, *_PRESUMED, _HIDING)


class Subject:
    """A factory of causal language models, and what it claims.

    Subclass it, or pass the arguments, to say more than can be found out by trying.

    Args:
        factory: ``config -> nn.Module``; a class will do. It raises NotImplementedError for a configuration that it
            cannot build. ``config`` is a :class:`diymodel.DIYConfig`, whose fields are its attributes.
        name: how the report calls it.
        claims: promises beyond what is found by trying, of :data:`CLAIMS`.
        lacks: ``{capability: reason}``: what it does not have although trying says otherwise, such as
            ``{"causal": "a prefix language model"}``. The checks that need it are skipped with the reason.
        reference: an independent implementation, ``(config, state_dict, ids (B, T)) -> logits (B, T, V)`` in float64.
            A bug that is on the cached and on the uncached path alike shows against nothing else.
        shifted: ``(module, ids, offset) -> logits`` with every position moved by ``offset``, of a model with rotary
            or other relative positions, whose logits do not change by that. Found where it takes positions and a
            token alone is the same at any.
        window: a position sees itself and the ``window - 1`` before it, in each layer; None: all before it.
        no_gradient: globs of parameter names that rightly get no gradient.
        save: ``(module, path)``: writes a checkpoint, a file or a directory of them.
        load: ``(path) -> module``: builds the module again from nothing but what ``save`` wrote.
        directory: opens what was saved of it: ``() -> (module, config, problems)``, as :class:`Opened`.
        declared: fields of :class:`Convention` that are stated rather than found, such as ``ignore_index=-1`` or
            ``new_cache=lambda module, config, rows: KVCache(rows, …)``.

    Raises:
        ValueError: a claim, capability or field is unknown; the message names the nearest. Or only one of save and
            load is given.
    """

    def __init__(
        self,
        factory: Factory | None = None,
        name: str = "",
        *,
        claims: Iterable[str] = (),
        lacks: Mapping[str, str] | None = None,
        reference: Reference | None = None,
        shifted: Shifted | None = None,
        window: int | None = None,
        no_gradient: Iterable[str] = (),
        save: Save | None = None,
        load: Load | None = None,
        directory: OpenDirectory | None = None,
        **declared: Any,
    ) -> None:
        self._factory = factory
        self._by_names: ByNames | None = None  # builds it, where the factory does not take a configuration of ours
        self.own_sizes: Mapping[str, Any] = {}  # fields of the configuration that the module does not heed
        self.widths: Mapping[str, int] = {}  # in whose place smaller ones are refused
        self.num_parameters = 0  # of the module that its convention was found with
        self.name = name or getattr(factory, "__name__", type(self).__name__)
        self.is_named = bool(name)  # by its author
        self.spec = f"path/to/file.py:{self.name}"  # what names it on a command line
        self.claims = frozenset(claims)
        self.lacks = dict(lacks or {})
        self.reference = reference
        self.shifted = shifted
        self.window = window
        self.no_gradient = tuple(no_gradient)
        if (save is None) != (load is None):
            raise ValueError(f"save={save!r} and load={load!r}: a checkpoint is checked by both, so give both")
        self.checkpoint = None if save is None or load is None else Checkpoint(save, load)
        self.directory = directory
        self.declared = declared
        self.built: set[DIYConfig] = set()  # configurations that the factory has built
        self.refused: set[str] = set()  # configurations that the factory could not build
        self.refusal = ""  # what it said to the last of them
        _check_known("claim", self.claims, CLAIMS)
        _check_known("capability", self.lacks, _CAPABILITIES)
        _check_known("field of Convention", declared, [field.name for field in fields(Convention)])

    def build(self, config: DIYConfig) -> nn.Module:
        """A new module; overridden by subclasses that have no factory."""
        if self._factory is None:
            raise TypeError(f"{type(self).__name__} has no factory: pass one, or override build(config)")
        return (self._by_names or self._factory)(config)

    def made(self, config: DIYConfig) -> nn.Module:
        """:meth:`build`, with NaN for what the constructor leaves undefined, so that a report is the same each time."""
        with nan_where_undefined():
            return self.build(config)

    def configs(self, length: int) -> st.SearchStrategy[dict[str, Any]]:
        """Configurations to try, as dicts of DIYConfig's fields, each holding ``length`` positions."""
        return configs(length)

    @functools.cached_property
    def convention(self) -> Convention:
        """How the module wants to be called, found by building and calling a tiny one.

        Raises:
            SubjectError: it cannot be built, or called with token ids.
        """
        with surroundings(), seeded():  # the first trial starts from the same state as a replay
            try:
                with time_limit(_PATIENCE):
                    config = self._first_config()
                    if config.hidden_size > _SMALL or config.head_size > _SMALL // 2:
                        self.widths = {name: getattr(config, name) for name in _WIDTHS}
                    convention = self._found(config)
                    self.own_sizes = find_own_sizes(self.made, config, convention)
                    if self.own_sizes:
                        config = replace(config, **self.own_sizes)
                        convention = self._found(config)
                    built = self.made(config)
                    self.num_parameters = sum(parameter.numel() for parameter in built.parameters())
                    if self.made(config) is built:
                        raise SubjectError(f"{self.name} returned the same module twice: build a new one in each call")
            except OutOfTime:
                raise SubjectError(f"{self.name} did not build and answer a few tiny calls in {_PATIENCE} s") from None
            return with_generating(lambda: self.made(config), config, convention, self._factory)

    def _found(self, config: DIYConfig) -> Convention:
        return find_convention(lambda: self.made(config), config, self.declared, self._factory)

    def describe(self) -> str:
        """How its modules are built, where that is not as usual, and called, in a line for their author."""
        notes = [self.convention.describe()]
        if self._by_names:
            notes.insert(0, self._by_names.said)
        if self.own_sizes:
            sizes = ", ".join(f"{name}={value}" for name, value in self.own_sizes.items())
            notes.append(f"whatever the configuration says, {sizes}")
        if self.num_parameters >= _LARGE:
            notes.append(f"the smallest has {self.num_parameters:,} parameters, so every trial takes its time")
        if self.left_out:
            notes.append(f"left out after an error: {'; '.join(self.left_out.values())}")
        return "; ".join(notes)

    @property
    def left_out(self) -> dict[str, str]:
        """What it has by name and all checks skip, since trying it ended in an error; with what was raised."""
        found = {capability: self.convention.missing.get(capability, "") for capability in _TRIED}
        return {capability: why for capability, why in found.items() if _ERROR.search(why)}

    def moved(self, lm: LM, ids: Tensor, offset: int) -> Tensor:
        """Logits (B, T, V) with every position moved by ``offset``, as its author says or by handing positions over."""
        if self.shifted is not None:
            return self.shifted(lm.module, ids, offset)
        return lm.placed(ids, torch.arange(offset, offset + ids.shape[1], device=ids.device).expand_as(ids))

    def missing(self, capability: str) -> str | None:
        """Why the subject lacks a capability; None if it has it."""
        assert capability in _CAPABILITIES, capability
        convention = self.convention
        if capability == "graph" and "gradient" in self.lacks:  # who cannot be trained has no gradient to show either
            return self.lacks["gradient"]
        if capability in self.lacks:
            return self.lacks[capability]
        if capability == _HIDING:
            return None if convention.left else self.missing("padding")
        if capability in _FOUND:
            return convention.missing.get(capability)
        if capability == "shifted" and convention.relative:
            return None
        if capability in _GIVEN:
            return f"the subject {_GIVEN[capability]}" if getattr(self, capability) is None else None
        if capability == "ragged_cache" and (convention.lengths or capability in convention.missing):
            return convention.missing.get(capability)
        if capability == "left_padding" and convention.lengths:
            return f"forward({convention.lengths}=…) says nothing of padding on the left"
        if capability in _PRESUMED or capability in self.claims:
            return None
        if capability == "cache_value":
            if convention.missing.get("cache") or convention.cache_is_value:
                return convention.missing.get("cache")
            kind = "kept on the module" if convention.cache_on_module else "an object that changes"
            return f"its cache is {kind}, and the subject does not claim 'cache_value'"
        if capability == "left_padding":
            if convention.left or convention.pads_left:
                return None
            otherwise = "a row padded on the left gives something else than alone, and the subject claims no such rows"
            return convention.missing.get("padding", otherwise)
        return f"the subject does not claim {capability!r}: {CLAIMS[capability]}"

    def _first_config(self) -> DIYConfig:
        """The first configuration that the factory builds a module of."""
        refusal: Exception | None = None
        for tied, sizes in itertools.product((False, True), _FIRST_SIZES):
            config = DIYConfig(
                vocab_size=_FIRST_LENGTH,
                max_seq_len=_FIRST_LENGTH,
                dropout=0.0,
                tie_word_embeddings=tied,
                **sizes,
            )
            try:
                module = self._first_module(config)
            except NotImplementedError as error:
                refusal = error
                continue
            if not isinstance(module, nn.Module):
                raise SubjectError(
                    f"{self.name}(config) returned {type(module).__name__}: expected an nn.Module; SUBJECT names a "
                    "factory config -> nn.Module, and a class will do"
                )
            return config
        tried = "; ".join(" ".join(f"{name}={value}" for name, value in sizes.items()) for sizes in _FIRST_SIZES)
        raise SubjectError(
            f"{self.name} refused every configuration that was tried ({tried}; each untied and tied, with vocab_size "
            f"and max_seq_len {_FIRST_LENGTH}), the last with: {str(refusal) or 'NotImplementedError'}"
        )

    def _first_module(self, config: DIYConfig) -> nn.Module:
        """What the factory builds; of a class that takes no configuration of ours, by the sizes that it names itself.

        Raises:
            NotImplementedError: it refuses this configuration.
            SubjectError: it fails.
        """
        try:
            return self.made(config)
        except (NotImplementedError, SubjectError):
            raise
        except Exception as error:  # a stranger's constructor may raise anything
            also = ""
            if self._factory is not None and isinstance(error, (AttributeError, TypeError)):
                self._by_names = ByNames(self._factory)
                try:
                    return self.made(config)
                except NotImplementedError:
                    raise
                except Exception as second:  # as above
                    self._by_names = None
                    also = f"; told its sizes by the names of its arguments: {said_where(second)}"
            raise SubjectError(f"{self.name}(config) failed: {said_where(error)}{_advice(error)}{also}") from error


def _advice(error: Exception) -> str:
    """What to write where a constructor wants other sizes, or something else than a configuration with our names."""
    if isinstance(error, (AssertionError, ValueError)):
        return "; a factory refuses sizes by NotImplementedError, or rounds them, as hidden_size, to what it can build"
    asked = isinstance(error, AttributeError) and isinstance(error.obj, DIYConfig)
    if not asked and not isinstance(error, TypeError):
        return ""
    names = ", ".join(field.name for field in fields(DIYConfig))
    return f"; config has {names}: if the model takes its sizes otherwise, name a function config -> model instead"


def resolve(spec: str | Subject | Factory | None) -> Subject:
    """The subject that SUBJECT names: ``package.module:name``, ``path/to/file.py:name``, ``hf:MODEL_TYPE`` (a tiny
    random transformers model), a directory in Hugging Face's form, a Subject, a factory, or None (or "diymodel") for
    our own model.

    Raises:
        SubjectError: it does not exist, does not import, or is no factory; one line that says what to write instead.
    """
    if isinstance(spec, (str, type(None))):
        subject = _subject_named(OWN if spec is None else spec)
        subject.spec = OWN if spec is None else spec
        if not subject.is_named:
            subject.name = subject.spec
        return subject
    subject = _subject_of(spec, getattr(spec, "__name__", type(spec).__name__))
    if place := defined_at(spec):
        subject.spec = place
    return subject


def _subject_named(spec: str) -> Subject:
    if spec == OWN:
        return Subject(claims=_OWN_CLAIMS, **own_model())
    if spec.startswith("hf:"):
        from diymodel.verify.hf import subject_of_type

        return subject_of_type(spec.removeprefix("hf:"))
    if spec and Path(spec).is_dir():
        from diymodel.verify.hf import subject_of_directory

        return subject_of_directory(spec)
    return _subject_of(import_named(spec), spec)


def _subject_of(found: Any, name: str) -> Subject:
    if isinstance(found, Subject):
        return found
    if inspect.isclass(found) and issubclass(found, Subject):
        return found()
    if isinstance(found, nn.Module):
        raise SubjectError(f"{name} is a built module: name the class or a function config -> nn.Module instead")
    if not callable(found):
        raise SubjectError(f"{name} is a {type(found).__name__}: expected a factory config -> nn.Module, or a class")
    return Subject(found, name)


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"no {what} is called {name!r}; the nearest is {nearest!r}")
