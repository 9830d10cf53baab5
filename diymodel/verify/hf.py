"""transformers models as subjects: ``hf:MODEL_TYPE``, and a directory in Hugging Face's form. Needs ``transformers``.

Nothing is downloaded, and no code of a directory is run.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.failure import CheckFailure, NotApplicable, SubjectError, refusal, said
from diymodel.verify.given import Opened
from diymodel.verify.hf_sizes import settings, sizes
from diymodel.verify.subject import Subject

_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
_LONG_ENOUGH = 64  # positions, where a model knows no limit
_SMALL = 2_000_000  # parameters; what stays larger has sizes that are not known here
_RESTARTS = "several tokens on a cache start its state anew: transformers continues it with one token at a time"
_UNMASKED = dict.fromkeys(("padding", "left_padding"), "its recurrent layers read no attention mask")
_MUTABLE = "transformers' caches change under their holder's hands"

# What a family does not have although trying says otherwise.
_LACKS = {
    "mamba": {"chunks": _RESTARTS},
    "falcon_mamba": {"chunks": _RESTARTS},
    "jamba": {"chunks": _RESTARTS},
    "rwkv": _UNMASKED,
    "recurrent_gemma": _UNMASKED,
    "roformer": {
        "left_padding": "its table of rotary angles is a parameter: drawn weights make its positions absolute"
    },
    "xlnet": {"causal": "a permutation language model sees all tokens"},
}


def subject_of_type(model_type: str) -> Subject:
    """Tiny random transformers models of the type; configurations that do not fit it are refused.

    Raises:
        SubjectError: transformers is not installed, or has no causal language model of that type.
    """
    known_types = _causal_types(f"hf:{model_type}")
    if model_type not in known_types:
        nearest = difflib.get_close_matches(model_type, known_types, n=1, cutoff=0.0)[0]
        raise SubjectError(
            f"transformers has no causal language model of type {model_type!r}; the nearest is {nearest!r}"
        )
    from transformers import AutoConfig

    try:
        known = AutoConfig.for_model(model_type)
    except Exception as error:  # each of hundreds of families has limits of its own
        raise SubjectError(f"transformers builds no {model_type!r} from its own defaults: {said(error)}") from error

    def small(config: DIYConfig) -> Any:
        return AutoConfig.for_model(model_type, **sizes(config, known), **settings(config, known))

    return _subject(small, f"hf:{model_type}", known)


def subject_of_directory(path: str) -> Subject:
    """The model in a directory: its family with all its settings, made small, and the directory's own weights.

    Raises:
        SubjectError: transformers is not installed, or the directory holds no model that it knows.
    """
    directory = Path(path)
    known_types = _causal_types(path)
    values = _read_config(directory)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise SubjectError(f'{directory / _CONFIG} has no "model_type": it describes no model of transformers')
    if model_type not in known_types:
        own = "; models that bring their own code are not run" if "auto_map" in values else ""
        raise SubjectError(
            f"{directory / _CONFIG} is of model_type {model_type!r}, which transformers has no causal language model "
            f"of{own}"
        )
    if not any(path for files in _WEIGHTS for path in directory.glob(files)):
        raise SubjectError(f"{directory} has a {_CONFIG} and no weights: expected {' or '.join(_WEIGHTS)}")
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each of hundreds of families has limits of its own
        raise SubjectError(f"transformers refuses {directory / _CONFIG}: {said(error)}") from error

    def small(config: DIYConfig) -> Any:
        return type(known)(**{**known.to_dict(), **sizes(config, known)})

    @functools.cache
    def opened() -> Opened:
        return _open(path)

    return _subject(small, path, known, directory=opened)


def _causal_types(needed_by: str) -> list[str]:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    except ImportError:
        raise SubjectError(f"{needed_by} needs transformers: pip install 'diymodel[hf]'") from None
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        from transformers.utils.logging import disable_progress_bar, set_verbosity

        set_verbosity(logging.CRITICAL)  # advice on training and on kernels; errors are raised as well
        disable_progress_bar()  # type: ignore[no-untyped-call]
    return list(CAUSAL)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / _CONFIG
    if not file.is_file():
        raise SubjectError(f"{directory} has no {_CONFIG}: expected a directory that save_pretrained wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SubjectError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SubjectError(f"{file} holds a {type(values).__name__}: expected an object with the model's settings")
    return values


def _subject(small: Callable[[DIYConfig], Any], name: str, known: Any, **given: Any) -> Subject:
    """Random models of what ``small`` makes of a configuration, of the family ``known``."""
    from transformers import AutoModelForCausalLM

    measured = False

    def build(config: DIYConfig) -> nn.Module:
        nonlocal measured
        try:
            hf_config = small(config)
            if hasattr(hf_config, "_experts_implementation"):
                hf_config._experts_implementation = "eager"  # the others refuse odd widths, and float64
            if not measured:
                _check_small(hf_config, name)
                measured = True
            model: nn.Module = AutoModelForCausalLM.from_config(hf_config)  # type: ignore[no-untyped-call]
        except SubjectError:
            raise
        except Exception as error:  # each of hundreds of families has limits of its own
            raise NotImplementedError(said(error)) from error
        return model

    lacks = {"cache_value": _MUTABLE, **_LACKS.get(known.model_type, {})}
    given |= {"claims": ("left_padding",), "lacks": lacks, "shifted": _shifted, "window": _window(small)}
    return Subject(build, name, cache_is_value=False, **given)


def _window(small: Callable[[DIYConfig], Any]) -> int | None:
    """How many positions each layer sees, where all have a sliding window."""
    if refusal(small, DIYConfig()) is not None:  # which building it will tell
        return None
    hf_config = small(DIYConfig())
    window = getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None) or ("sliding_attention",)
    return window if isinstance(window, int) and set(kinds) == {"sliding_attention"} else None


def _check_small(hf_config: Any, name: str) -> None:
    """Refuse a model that would fill the memory, before it is built.

    Raises:
        SubjectError: it is large, in spite of small sizes.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)  # type: ignore[no-untyped-call]
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _SMALL:
        raise SubjectError(
            f"{name} has {count / 1e6:.0f} million parameters where the smallest sizes are asked for: its sizes have "
            "other names than those known here; hf:MODEL_TYPE of its text model may do"
        )


def _open(path: str) -> Opened:
    """The model with the weights of a directory, in their dtype, and what does not fit."""
    from transformers import AutoModelForCausalLM

    how = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True, "torch_dtype": "auto"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True, **how)
    except Exception as error:  # a damaged file raises as its format does
        raise CheckFailure(f"the directory's weights must load, saw {said(error)}") from error
    model, loading = loaded
    problems = [
        *(f"{name} missing, and drawn at random instead" for name in sorted(loading["missing_keys"])),
        *(f"{name} left over" for name in sorted(loading["unexpected_keys"])),
        *(
            f"{name} of shape {tuple(saved)}, where the model has {tuple(needed)}"
            for name, saved, needed in sorted(loading["mismatched_keys"])
        ),
    ]
    return Opened(model.eval(), _sizes_of(model.config), tuple(problems))


def _sizes_of(hf_config: Any) -> SimpleNamespace:
    """The sizes of a model in our words, as far as it has them."""
    text = hf_config.get_text_config()
    found = {name: getattr(text, theirs) for name, theirs in _SIZES.items() if hasattr(text, theirs)}
    return SimpleNamespace(**{"max_seq_len": _LONG_ENOUGH, **found})


def _shifted(module: nn.Module, input_ids: Tensor, offset: int) -> Tensor:
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise NotApplicable("forward has no position_ids")
    if getattr(module.config, "rope_parameters", None) is None:
        raise NotApplicable("the positions are not rotary")
    positions = torch.arange(offset, offset + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    logits: Tensor = module(input_ids, position_ids=positions).logits
    return logits
