"""What a stranger hands over: something that builds a module from a configuration, and what is known about it."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import Convention, Reference, Shifted, own_model
from diymodel.verify.failure import SubjectError
from diymodel.verify.probing import find_convention
from diymodel.verify.strategies import configs

OWN = "diymodel"  # how our own model is called

Factory = Callable[[Any], nn.Module]

# Tried in this order until the factory builds one: what it is called with for finding its convention.
_FIRST_CONFIGS = (
    {"num_layers": 1, "num_heads": 2, "hidden_size": 8},
    {"num_layers": 2, "num_heads": 2, "hidden_size": 16},
    {"num_layers": 2, "num_heads": 4, "hidden_size": 64},
)


CLAIMS = {  # promises that no trying can find
    "cache_value": "a cache never changes once it is returned",
    "strict_context": "more than max_seq_len tokens are refused",
    "finite_loss": "with every label ignored the loss is 0, not NaN",
    "left_padding": "a row may be padded on the left",
}
_FOUND = ("cache", "chunks", "padding", "ragged_cache", "loss", "gradient")
_GIVEN = {
    "reference": "names no reference: Subject(…, reference=…)",
    "shifted": "does not say how to shift its positions: Subject(…, shifted=…)",
    "window": "has no sliding window: Subject(…, window=…)",
}
_CAPABILITIES = (*CLAIMS, *_FOUND, *_GIVEN, "causal")


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
            or other relative positions, whose logits do not change by that.
        window: a position sees itself and the ``window - 1`` before it, in each layer; None: all before it.
        no_gradient: globs of parameter names that rightly get no gradient.
        declared: fields of :class:`Convention` that are stated rather than found, such as ``ignore_index=-1`` or
            ``new_cache=lambda module, config, rows: KVCache(rows, …)``.

    Raises:
        ValueError: a claim, capability or field is unknown; the message names the nearest.
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
        **declared: Any,
    ) -> None:
        self._factory = factory
        self.name = name or getattr(factory, "__name__", type(self).__name__)
        self.claims = frozenset(claims)
        self.lacks = dict(lacks or {})
        self.reference = reference
        self.shifted = shifted
        self.window = window
        self.no_gradient = tuple(no_gradient)
        self.declared = declared
        self.refused: set[str] = set()  # configurations that the factory could not build
        _check_known("claim", self.claims, CLAIMS)
        _check_known("capability", self.lacks, _CAPABILITIES)
        _check_known("field of Convention", declared, [field.name for field in fields(Convention)])

    def build(self, config: DIYConfig) -> nn.Module:
        """A new module; overridden by subclasses that have no factory."""
        if self._factory is None:
            raise TypeError(f"{type(self).__name__} has no factory: pass one, or override build(config)")
        return self._factory(config)

    def configs(self, length: int) -> st.SearchStrategy[dict[str, Any]]:
        """Configurations to try, as dicts of DIYConfig's fields, each holding ``length`` positions."""
        return configs(length)

    @functools.cached_property
    def convention(self) -> Convention:
        """How the module wants to be called, found by building and calling a tiny one.

        Raises:
            SubjectError: it cannot be built, or called with token ids.
        """
        with torch.random.fork_rng(devices=[]):  # the first trial starts from the same state as a replay
            config = self._first_config()
            return find_convention(lambda: self.build(config), config, self.declared)

    def missing(self, capability: str) -> str | None:
        """Why the subject lacks a capability; None if it has it."""
        assert capability in _CAPABILITIES, capability
        convention = self.convention
        if capability in self.lacks:
            return self.lacks[capability]
        if capability in _FOUND:
            return convention.missing.get(capability)
        if capability in _GIVEN:
            return f"the subject {_GIVEN[capability]}" if getattr(self, capability) is None else None
        if capability == "causal" or capability in self.claims:
            return None
        if capability == "cache_value":
            if convention.missing.get("cache") or convention.cache_is_value:
                return convention.missing.get("cache")
            kind = "kept on the module" if convention.cache_on_module else "an object that changes"
            return f"its cache is {kind}, and the subject does not claim 'cache_value'"
        if capability == "left_padding" and convention.left:
            return None
        return f"the subject does not claim {capability!r}: {CLAIMS[capability]}"

    def _first_config(self) -> DIYConfig:
        """The first configuration that the factory builds a module of."""
        refusal: Exception | None = None
        for sizes in _FIRST_CONFIGS:
            config = DIYConfig(vocab_size=16, max_seq_len=16, dropout=0.0, **sizes)  # type: ignore[arg-type]
            try:
                module = self.build(config)
            except NotImplementedError as error:
                refusal = error
                continue
            except Exception as error:  # a stranger's constructor may raise anything
                raise SubjectError(f"{self.name}(config) failed: {type(error).__name__}: {error}") from error
            if not isinstance(module, nn.Module):
                raise SubjectError(
                    f"{self.name}(config) returned {type(module).__name__}: expected an nn.Module; SUBJECT names a "
                    "factory config -> nn.Module, and a class will do"
                )
            return config
        raise SubjectError(f"{self.name} refused every configuration that was tried, the last with: {refusal}")


def resolve(spec: str | Subject | Factory | None) -> Subject:
    """The subject that SUBJECT names: ``package.module:name``, ``path/to/file.py:name``, ``hf:MODEL_TYPE`` (a tiny
    random transformers model), a Subject, a factory, or None (or "diymodel") for our own model.

    Raises:
        SubjectError: it does not exist, does not import, or is no factory; one line that says what to write instead.
    """
    if spec is None or spec == OWN:
        return Subject(name=OWN, claims=("cache_value", "strict_context", "finite_loss"), **own_model())
    if isinstance(spec, str) and spec.startswith("hf:"):
        from diymodel.verify.hf import subject_of_type

        return subject_of_type(spec.removeprefix("hf:"))
    if isinstance(spec, str):
        return _subject_of(_import(spec), spec)
    return _subject_of(spec, getattr(spec, "__name__", type(spec).__name__))


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


def _import(spec: str) -> Any:
    place, colon, name = spec.rpartition(":")
    if not colon or not name:
        raise SubjectError(f"{spec!r} names no model: write path/to/file.py:ClassName or package.module:ClassName")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except SubjectError:
        raise
    except Exception as error:  # a stranger's module may raise anything
        raise SubjectError(f"{place} does not import: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        candidates = [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, nn.Module)]
        known = f"; it has {', '.join(candidates)}" if candidates else ""
        raise SubjectError(f"{place} has no {name!r}{known}")
    return getattr(module, name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise SubjectError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up
    sys.path.insert(0, str(path.parent))  # as python does for a script: a file may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"no {what} is called {name!r}; the nearest is {nearest!r}")
