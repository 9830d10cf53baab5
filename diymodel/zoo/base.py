"""The correct models: which there are, and what each promises and lacks."""

from __future__ import annotations

import itertools
import linecache
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from diymodel.verify.calling.generating import CAPABILITIES as GENERATING
from diymodel.verify.subject import Subject

NO_GENERATION = frozenset({*GENERATING, "strict_generation", "generate_eval"})
STRICT = ("strict_context", "finite_loss")  # what every base that can promises

_loaded = itertools.count()


@dataclass(frozen=True)
class Base:
    """A correct model."""

    name: str  # its file in bases/
    factory: str  # class or function in it: config -> nn.Module
    lacks: frozenset[str]  # capabilities that it does not have, as trying must find
    claims: tuple[str, ...] = STRICT
    declared: Mapping[str, Callable[[types.ModuleType], Any]] = field(default_factory=dict)
    # further arguments of its Subject, made from the loaded file
    generation: frozenset[str] = NO_GENERATION  # what it lacks of generating

    @property
    def source(self) -> str:
        """The text of its file."""
        return resources.files("diymodel.zoo.bases").joinpath(f"{self.name}.py").read_text(encoding="utf-8")

    def subject(self, source: str | None = None, name: str = "", claims: tuple[str, ...] = ()) -> Subject:
        """The model, or what it becomes with another ``source``, as a subject with further ``claims``."""
        module = load(self.source if source is None else source, self.name)
        declared = {key: make(module) for key, make in self.declared.items()}
        return Subject(
            getattr(module, self.factory), name or f"zoo:{self.name}", claims=(*self.claims, *claims), **declared
        )


def load(source: str, name: str) -> types.ModuleType:
    """A module of this text; a traceback shows its lines."""
    count = next(_loaded)
    filename = f"<zoo {name} {count}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(f"zoo_{name}_{count}")
    sys.modules[module.__name__] = module  # dataclasses and torch.compile look their module up
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


_NO_CACHE = frozenset({"cache", "chunks", "cache_value"})
_NO_PADDING = frozenset({"padding", "ragged_cache", "left_padding"})
_ONLY_SAMPLES = NO_GENERATION - {"generate", "generate_batch", "greedy", "sampling", "top_k"}

BASES = {
    base.name: base
    for base in (
        Base("nanogpt", "NanoGPT", _NO_CACHE | _NO_PADDING, generation=_ONLY_SAMPLES),
        Base("rotary", "Rotary", _NO_PADDING | {"loss", "labelled_logits"}),
        Base("hub", "Hub", frozenset({"cache_value", "ragged_cache"})),
        Base("plain", "Plain", _NO_CACHE | _NO_PADDING | {"loss", "labelled_logits"}),
        Base("onmodule", "OnModule", _NO_PADDING | {"cache_value", "loss", "labelled_logits"}, ("strict_context",)),
        Base(
            "fastlike",
            "FastLike",
            _NO_PADDING | {"cache_value", "loss", "labelled_logits", "gradient", "graph"},
            ("strict_context",),
        ),
        Base("supplied", "Supplied", _NO_PADDING | {"cache_value", "labelled_logits"}),
        Base(
            "startpos",
            "StartPos",
            _NO_PADDING | {"cache_value", "loss", "labelled_logits", "gradient", "graph"},
            ("strict_context",),
        ),
        Base("resettable", "Resettable", _NO_PADDING | {"cache_value", "loss", "labelled_logits"}, ("strict_context",)),
        Base(
            "saved",
            "Saved",
            _NO_PADDING | {"loss", "labelled_logits"},
            ("strict_context",),
            {"directory": lambda module: module.example},
        ),
        Base(
            "intermediates", "WithIntermediates", frozenset({"cache_value", "ragged_cache", "loss", "labelled_logits"})
        ),
        Base(
            "windowed",
            "Windowed",
            _NO_PADDING | {"cache_value", "loss", "labelled_logits", "strict_context"},
            ("cache_filled",),
            {"window": lambda file: file.WINDOW, "shifted": lambda file: file.shifted},
        ),
        Base("learned", "Learned", frozenset(), (*STRICT, "left_padding", "ragged_cache", "nan_contained")),
        Base(
            "ragged",
            "Ragged",
            frozenset({"left_padding", "loss", "labelled_logits"}),
            ("strict_context", "nan_contained"),
        ),
        Base("packed", "Packed", _NO_CACHE | _NO_PADDING),
        Base(
            "pretrained",
            "Pretrained",
            _NO_PADDING | {"cache_value", "loss", "labelled_logits"},
            ("strict_context", "small_init", "meta_init"),
            {"save": lambda file: file.save, "load": lambda file: file.load},
        ),
        Base("alibi", "Alibi", _NO_PADDING | {"loss", "labelled_logits", "strict_context"}, ()),
        Base(
            "writer",
            "Writer",
            frozenset({"loss", "labelled_logits"}),
            (*STRICT, "ragged_cache", "strict_generation", "generate_eval"),
            generation=frozenset(),
        ),
        Base("parallel", "ParallelLM", _NO_PADDING | {"loss", "labelled_logits"}),
        Base("postnorm", "PostNorm", _NO_CACHE | _NO_PADDING),
        Base("switch", "SwitchForCausalLM", frozenset(), (*STRICT, "left_padding", "ragged_cache")),
        Base(
            "rolling",
            "Rolling",
            _NO_PADDING | {"loss", "labelled_logits", "strict_context"},
            (),
            {"window": lambda file: file.WINDOW, "shifted": lambda file: file.shifted},
        ),
        Base("headwise", "GPTLanguageModel", _NO_CACHE | _NO_PADDING, generation=_ONLY_SAMPLES | {"top_k", "greedy"}),
        Base(
            "scribe",
            "Scribe",
            frozenset({"cache_value", "loss", "labelled_logits"}),
            ("strict_context", "left_padding", "ragged_cache", "strict_generation", "generate_eval"),
            generation=frozenset(),
        ),
        Base(
            "kept",
            "Kept",
            _NO_PADDING | {"loss", "labelled_logits"},
            ("strict_context", "small_init", "meta_init"),
            {"save": lambda file: file.save_pretrained, "load": lambda file: file.from_pretrained},
        ),
        Base(
            "experts",
            "Experts",
            _NO_CACHE | {"left_padding", "loss", "labelled_logits"},
            ("strict_context", "nan_contained", "strict_generation", "generate_eval"),
            generation=NO_GENERATION - {"generate", "generate_batch", "generate_padded", "greedy"},
        ),
        Base("recurrent", "Recurrent", _NO_CACHE | _NO_PADDING | {"loss", "labelled_logits", "strict_context"}, ()),
        Base("timeshift", "TimeShift", _NO_CACHE | _NO_PADDING),
        Base("statespace", "StateSpace", _NO_PADDING | {"loss", "labelled_logits", "strict_context"}, ()),
    )
}
