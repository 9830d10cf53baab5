"""What a stranger hands over: something that builds a module from a configuration, and what is known about it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import Convention, Loss, find_convention, own_model
from diymodel.verify.failure import SubjectError

OWN = "diymodel"  # how our own model is called

Factory = Callable[[Any], nn.Module]

# Tried in this order until the factory builds one: what it is called with for finding its convention.
_FIRST_CONFIGS = (
    {"num_layers": 1, "num_heads": 2, "hidden_size": 8},
    {"num_layers": 2, "num_heads": 2, "hidden_size": 16},
    {"num_layers": 2, "num_heads": 4, "hidden_size": 64},
)


class Subject:
    """A factory of causal language models, and what it claims.

    Subclass it, or pass the arguments, to say more than can be found out by trying.

    Args:
        factory: ``config -> nn.Module``; a class will do. It raises NotImplementedError for a configuration that it
            cannot build. ``config`` is a :class:`diymodel.DIYConfig`, whose fields are its attributes.
        name: how the report calls it.
        claims: promises beyond what is found by trying: "cache_value" (a cache never changes once returned),
            "strict_context" (over-long input is refused), "finite_loss" (0, not NaN, with every label ignored).
        loss: of logits (B, T, V) and unshifted labels (B, T), where the module leaves it to its caller.
        convention: how to call the module; None: found by trying.
    """

    def __init__(
        self,
        factory: Factory | None = None,
        name: str = "",
        claims: tuple[str, ...] = (),
        loss: Loss | None = None,
        convention: Convention | None = None,
    ) -> None:
        self._factory = factory
        self.name = name or getattr(factory, "__name__", type(self).__name__)
        self.claims = frozenset(claims)
        self._loss = loss
        self.refused: set[str] = set()  # configurations that the factory could not build
        if convention is not None:
            self.convention = convention  # shadows the cached property

    def build(self, config: DIYConfig) -> nn.Module:
        """A new module; overridden by subclasses that have no factory."""
        if self._factory is None:
            raise TypeError(f"{type(self).__name__} has no factory: pass one, or override build(config)")
        return self._factory(config)

    def configs(self, length: int) -> st.SearchStrategy[dict[str, Any]]:
        """Configurations to try, as dicts of DIYConfig's fields, each holding ``length`` positions."""
        return _configs(length)

    @functools.cached_property
    def convention(self) -> Convention:
        """How the module wants to be called, found by building and calling a tiny one."""
        with torch.random.fork_rng(devices=[]):  # the first trial starts from the same state as a replay
            module, config = self._first_module()
            convention = find_convention(module, config)
        if self._loss is None:
            return convention
        missing = {name: reason for name, reason in convention.missing.items() if name != "loss"}
        return replace(convention, loss=self._loss, missing=missing)

    def missing(self, capability: str) -> str | None:
        """Why the subject lacks a capability; None if it has it."""
        if capability in ("cache", "chunks", "padding", "loss"):
            return self.convention.missing.get(capability)
        if capability == "cache_value" and self.missing("cache") is None and self.convention.cache_is_value:
            return None
        return None if capability in self.claims else f"the subject does not claim {capability!r}"

    def _first_module(self) -> tuple[nn.Module, DIYConfig]:
        refusal: Exception | None = None
        for fields in _FIRST_CONFIGS:
            config = DIYConfig(vocab_size=16, max_seq_len=16, dropout=0.0, **fields)  # type: ignore[arg-type]
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
            return module, config
        raise SubjectError(f"{self.name} refused every configuration that was tried, the last with: {refusal}")


@st.composite
def _configs(draw: st.DrawFn, length: int) -> dict[str, Any]:
    """Tiny configurations; one layer and several, grouped queries, tying, other epsilons and thetas all turn up."""
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    head_size = 2 * draw(st.integers(1, 2))
    return {
        "vocab_size": draw(st.integers(length + 2, length + 6)),
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": heads * head_size,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 9)),
        "max_seq_len": length + draw(st.integers(0, 3)),
        "dropout": draw(st.sampled_from((0.0, 0.1, 0.5))),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-2))),
        "rope_theta": draw(st.sampled_from((10000.0, 10.0, 500000.0))),
        "tie_word_embeddings": draw(st.booleans()),
    }


def resolve(spec: str | Subject | Factory | None) -> Subject:
    """The subject that SUBJECT names: ``package.module:name``, ``path/to/file.py:name``, ``hf:MODEL_TYPE`` (a tiny
    random transformers model), a Subject, a factory, or None (or "diymodel") for our own model.

    Raises:
        SubjectError: it does not exist, does not import, or is no factory; one line that says what to write instead.
    """
    if spec is None or spec == OWN:
        model, loss = own_model()
        return Subject(model, OWN, ("cache_value", "strict_context", "finite_loss"), loss)
    if isinstance(spec, str) and spec.startswith("hf:"):
        from diymodel.verify.hf import factory_of

        return Subject(factory_of(spec.removeprefix("hf:")), spec)
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
