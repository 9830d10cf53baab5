"""What the signature of a stranger's ``generate`` tells: which of its parameters mean what the harness knows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from diymodel.verify.calling.entries import Entry
from diymodel.verify.calling.generating import Generating
from diymodel.verify.convention import Convention

NAMES = {
    "ids": (
        *("input_ids", "input_tensor", "idx", "tokens", "token_ids", "inputs", "prompt", "prompts", "prompt_ids"),
        *("prompt_tokens", "prime", "context", "x"),
    ),
    "new_tokens": (
        *("max_new_tokens", "num_new_tokens", "n_new_tokens", "new_tokens", "max_tokens", "num_tokens", "n_tokens"),
        *("max_new_token", "max_new_length", "max_length_new", "max_generate_tokens", "max_gen_tokens"),
        *("n_new", "n_tokens_to_generate"),
        *("tokens_to_generate", "max_gen_len", "max_gen", "gen_len", "num_steps", "n_steps", "steps", "seq_len"),
        *("max_length", "max_len", "length", "max_returned_tokens", "total_tokens"),
    ),
    "mask": ("attention_mask", "padding_mask", "mask"),
    "lengths": ("seq_lengths", "prompt_lens", "prompt_lengths", "lengths"),
    "eos": ("eos_token_id", "eos_token", "eos_id", "eos", "stop_token_id", "stop_token", "end_token"),
    "pad": ("pad_token_id", "pad_token", "pad_id", "pad"),
    "do_sample": ("do_sample", "sample"),
    "temperature": ("temperature", "temp"),
    "top_k": ("top_k", "topk"),
    "top_p": ("top_p", "topp"),
    "min_p": ("min_p",),
    "filter": ("filter_thres",),  # lucidrains': the share of the tokens that is left out
    "repetition_penalty": ("repetition_penalty", "rep_penalty", "repeat_penalty"),
    "seed": ("seed",),
    "use_cache": ("use_cache", "cache_kv", "use_kv_cache"),
    "context": (  # how many tokens the model holds
        *("context_size", "context_length", "context_len", "context_window", "ctx_size", "ctx_len", "block_size"),
        *("max_context", "max_context_size", "max_context_length", "max_seq_len", "max_seq_length"),
    ),
    "device": ("device",),
}
_NEUTRAL = {  # what settings are that change nothing, where they have no default
    "eos": -1,
    "pad": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": None,
    "top_p": 1.0,
    "min_p": 0.0,
    "filter": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "use_cache": False,
}
# Each is switched off, whatever number is its default.
_NARROWING = ("eos", "top_p", "min_p", "filter", "repetition_penalty")
_ALWAYS_TOTALS = ("max_returned_tokens", "total_tokens")  # litgpt's: of prompt and new tokens together
_TRANSFORMERS = {  # its generate hides them behind **kwargs
    role: NAMES[role][0] for role in NAMES if role not in ("lengths", "seed", "context", "device")
}


def by_names(module: nn.Module, convention: Convention, entry: Entry) -> Generating:
    """By the names of its parameters; no names: there is no such entry."""
    parameters = entry.parameters(module)
    names = _names(module, parameters)
    return Generating(
        names,
        _fixed(names, parameters),
        counts_prompt=names.get("new_tokens") in _ALWAYS_TOTALS,
        mask_dtype=convention.mask_dtype,
        mask_marks_padding=convention.mask_marks_padding,
        entry=entry,
    )


def lacking(generating: Generating, parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """What keeps an entry from being called; None: token ids, their number, and all without default are known."""
    named = {*generating.names.values(), *generating.fixed}
    unknown = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in named
    ]
    if unknown:
        return f"needs {', '.join(unknown)}, which the harness does not know"
    if generating.names.get("ids") not in NAMES["ids"]:
        return "has no parameter for token ids that the harness knows"
    return None if "new_tokens" in generating.names else "has no parameter for the number of new tokens"


def _names(module: Any, parameters: Mapping[str, inspect.Parameter]) -> dict[str, str]:
    """Names by role."""
    if not parameters:
        return {}
    known = {role: next((name for name in names if name in parameters), "") for role, names in NAMES.items()}
    names = {role: name for role, name in known.items() if name}
    if "context" in names and parameters[names["context"]].default is not inspect.Parameter.empty:
        del names["context"]  # it knows better
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "new_tokens" not in names and takes_more and hasattr(module, "generation_config"):
        return {**_TRANSFORMERS, **names}  # transformers' own generate, or one that hands everything on to it
    names.setdefault("ids", next(iter(parameters)))
    return names


def _fixed(names: Mapping[str, str], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Arguments for what has no default, or one that would end or narrow every generation."""
    fixed = {}
    for role in _NEUTRAL.keys() & names.keys():
        parameter = parameters.get(names[role])
        if parameter is None:  # behind transformers' **kwargs, which its own configuration has defaults for
            needed = role == "eos"
        else:
            default = parameter.default
            needed = default is parameter.empty or (role in _NARROWING and isinstance(default, (int, float)))
        if needed:
            fixed[names[role]] = _NEUTRAL[role]
    return fixed
