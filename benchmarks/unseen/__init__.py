"""Models that the harness was not written with, and bugs in them that its diagnosis has not seen.

Each other file holds one correct model, written from memory and apart from the zoo. ``bugs.py`` lists bugs of the first
five, one small change each, ``second_bugs.py`` bugs of the next six, ``third_bugs.py`` bugs of the next seven, and
``fourth_bugs.py`` bugs of the last six. The author of a model promises here what cannot be found by trying, as a user
of the harness may.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from diymodel import DIYConfig
from diymodel.verify.subject import Subject

HERE = Path(__file__).parent

Factory = Callable[[DIYConfig], nn.Module]
Call = Callable[[Any, Tensor], Tensor]


class Base(NamedTuple):
    """One of the correct models."""

    factory: str  # its name in the file
    claims: tuple[str, ...] = ()
    window: int | None = None
    checkpoint: bool = False  # the file has save and load
    reference: Call | None = None  # its logits, where the model before the change serves as the reference


BASES = {
    "gpt2_like": Base("GPT2", ("cache_value", "strict_context", "strict_generation", "small_init", "ragged_cache")),
    "llama_like": Base(
        "Llama",
        (
            *("strict_context", "finite_loss", "left_padding", "nan_contained", "strict_generation"),
            *("generate_eval", "meta_init", "cache_filled"),
        ),
        reference=lambda module, ids: module(ids).logits,
    ),
    "nano_like": Base(
        "build", ("strict_context", "small_init"), checkpoint=True, reference=lambda m, ids: m(ids, ids)[0]
    ),
    "local_moe": Base("LocalMoE", ("cache_filled", "finite_loss"), window=4, reference=lambda m, ids: m(ids)),
    "recurrent": Base("Recurrent", ("cache_value", "finite_loss")),
}

SECOND_BASES = {  # built by the names of their own sizes; nothing is promised beyond what can be found
    "gptj_like": Base("GPTJForCausalLM"),
    "latent_moe": Base("LatentMoE"),
    "gemma_like": Base("GemmaForCausalLM"),
    "learner_chars": Base("CharTransformer"),
    "recurrent_hybrid": Base("HybridLM"),
    "llama2c_like": Base("Transformer"),
}

THIRD_BASES = {  # what a file says of itself, and nothing more
    "learner_route": Base("DIYForCausalLM", checkpoint=True),
    "gpt_scratch": Base("build"),
    "llama_scratch": Base("build", reference=lambda module, ids: module(ids)),  # it takes the weights of another
    "hf_modeling": Base("build", window=4),
    "alibi_functional": Base("AlibiLM"),
    "moe_softcap": Base("MoELM"),
    "mamba_state": Base("MambaLM"),
}

FOURTH_BASES = {  # what a file says of itself; three are ports, whose weights come from elsewhere
    "learner_qwen": Base(
        "build",
        ("strict_context", "strict_generation", "cache_value"),
        checkpoint=True,
        reference=lambda m, ids: m(ids)[0],
    ),
    "lecture_heads": Base("GPTLanguageModel", ("strict_context", "small_init", "nan_contained")),
    "retention_state": Base("RetNet", ("cache_value", "meta_init")),
    "neox_parallel": Base(
        "build", ("strict_context", "strict_generation", "cache_value"), reference=lambda m, ids: m(ids).logits
    ),
    "multiquery_static": Base("build", ("strict_context", "strict_generation"), checkpoint=True),
    "granite_sinks": Base(
        "GraniteLM",
        ("strict_context", "strict_generation", "cache_filled"),
        window=4,
        reference=lambda m, ids: m(ids).logits,
    ),
}


@functools.cache
def source_of(base: str) -> str:
    """The text of a correct model."""
    return (HERE / f"{base}.py").read_text("utf-8")


def subject_of(base: str, source: str | None = None) -> Subject:
    """What its author hands to the harness: the model in its file, or in a changed text of it."""
    stated = (BASES | SECOND_BASES | THIRD_BASES | FOURTH_BASES)[base]
    names = _run(base, source_of(base) if source is None else source)
    more: dict[str, Any] = {"save": names["save"], "load": names["load"]} if stated.checkpoint else {}
    if stated.reference is not None:
        build = _run(base, source_of(base))[stated.factory]
        more["reference"] = functools.partial(_reference, build, stated.reference)
    return Subject(names[stated.factory], f"unseen:{base}", claims=stated.claims, window=stated.window, **more)


def _run(base: str, source: str) -> dict[str, Any]:
    """The names of a file with this text, which lies where its tracebacks say as long as the program runs."""
    name = f"{base}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    path = Path(_room().name) / f"{name}.py"
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return vars(module)


@functools.cache
def _room() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _reference(build: Factory, call: Call, config: DIYConfig, state: dict[str, Tensor], ids: Tensor) -> Tensor:
    module = build(config).double().eval()
    module.load_state_dict(state, strict=False)  # it makes tables of its own where a change keeps them out
    return call(module, ids)
