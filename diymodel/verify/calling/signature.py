"""What the signature of a stranger's ``forward`` tells: which of its parameters mean what the harness knows."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from diymodel.verify.failure import SubjectError

NAMES = {
    "ids": ("input_ids", "idx", "tokens", "token_ids", "in_idx", "x", "inputs", "input", "src", "ids"),
    "mask": ("attention_mask", "padding_mask", "key_padding_mask", "src_key_padding_mask", "pad_mask", "mask", "masks"),
    "lengths": ("seq_lengths", "lengths", "seq_lens"),
    "left": ("seq_start_pos",),
    "causal": ("causal_mask", "attn_mask", "src_mask", "tgt_mask"),
    "positions": ("position_ids", "input_pos", "positions", "pos_ids", "segment_pos", "token_positions"),
    "start": (
        *("start_pos", "start_position", "start_idx", "start_index", "past_length", "past_len"),
        *("cache_len", "cache_length"),
        *("pos_offset", "position_offset", "offset"),
    ),
    "past": (
        *("past_key_values", "past_kv", "past", "cache", "kv_cache", "layer_past", "caches", "kv_caches"),
        *("cache_params", "state", "states", "hidden", "hidden_state", "hidden_states", "h", "s"),
        *("prev_state", "prev_states", "prev_hidden", "prev_hiddens", "hiddens", "memories", "mems", "mem"),
    ),
    "use_cache": ("use_cache", "return_intermediates"),
    "labels": ("labels", "targets", "target", "lm_labels", "target_ids", "target_token_ids", "y"),
    "documents": ("document_ids", "doc_ids", "segment_ids", "seq_ids"),
}
LABELS_SHIFTED = ("targets", "target", "target_ids", "target_token_ids", "y")  # nanoGPT's, whose caller shifts them
_ASKS_FOR_LOSS = re.compile(r"(return|compute|calculate|calc|get|with|output)_loss")
_INSTEAD_OF_LOGITS = re.compile(r"(return|output)_(only_)?(embed(ding)?s?|hiddens?|hidden_states?|features)")
_ANYTHING = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
_KEPT = "(kvs?|pasts?|presents?|caches?)"
_PAST = re.compile(  # past_kvs, kv_cache_list, past_key_value_states
    rf"([a-z]+_)*{_KEPT}(_list|_values|_states?)?|(past|prev|cached?)_key_values?(_list|_states?)?"
)
_KEYS = re.compile(r"((past|prev|cached?|caches)_(k|ks|keys?)|(k|keys?)_(past|prev|caches?))$")  # past_k, key_cache
_TWINS = {"k": "v", "ks": "vs", "key": "value", "keys": "values"}
_ASKS = re.compile(  # return_cache, return_next_prev_hiddens
    rf"(use|return|with|enable|output)_([a-z]+_)*{_KEPT}|return_([a-z]+_)*(hiddens|memory|memories|mems|states?)"
)
_MEMORIES = re.compile("memory|memories|mems")


def parameter_names(module: nn.Module) -> dict[str, str]:
    """The names that ``forward`` gives to what :class:`Convention` knows.

    Raises:
        SubjectError: it takes no token ids.
    """
    known = parameters(module)
    switches = [name for name, parameter in known.items() if isinstance(parameter.default, bool)]
    values = [name for name in known if name not in switches]
    candidates = {
        role: [name for name in names if name in (known if role == "use_cache" else values)]
        for role, names in NAMES.items()
    }
    asking = [name for name in known if _ASKS.fullmatch(name) or (name in switches and _PAST.fullmatch(name))]
    candidates["use_cache"] += asking
    candidates["past"] += [name for name in values if _PAST.fullmatch(name) and name not in asking]
    kept = [name for name in values if _PAST.fullmatch(name)]
    if kept and not {*NAMES["past"]} & {*values}:  # infini-transformer's memories are of segments, its cache of tokens
        asking = [name for name in asking if not _MEMORIES.search(name)]
        candidates["use_cache"] = [name for name in candidates["use_cache"] if name in (*NAMES["use_cache"], *asking)]
    if asking and "memory" in values:  # alone, it may as well be what an encoder made
        candidates["past"].append("memory")
    if not {*NAMES["past"]} & {*values} and (pair := find_pair(values)):
        candidates["past"], candidates["past_values"] = [[name] for name in pair]
    candidates["ids"].sort(key=lambda name: known[name].default is not inspect.Parameter.empty)  # required ones first
    found = {role: names[0] for role, names in candidates.items() if names}
    if not known:
        raise SubjectError("forward takes no arguments: expected forward(input_ids, …)")
    found.setdefault("ids", next(iter(known)))
    if "labels" not in found and (asking := list(filter(_ASKS_FOR_LOSS.fullmatch, switches))):
        found["loss_switch"] = asking[0]
    return found


def find_pair(among: Sequence[str]) -> tuple[str, str] | None:
    """The names of cached keys and of cached values, such as cache_k and cache_v."""
    pairs = {name: "_".join(_TWINS.get(word, word) for word in name.split("_")) for name in filter(_KEYS.match, among)}
    return next(((keys, values) for keys, values in pairs.items() if values in among), None)


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Those of ``forward`` that can be given by name, with what it reads from its ``**kwargs``."""
    told = told_parameters(called(module))
    named = {
        name: parameter
        for name, parameter in told.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    others = next((name for name, parameter in told.items() if parameter.kind is parameter.VAR_KEYWORD), None)
    method = called(module)
    return (_read_from(others, getattr(method, "__func__", method)) if others else {}) | named


@functools.cache
def _read_from(others: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The names that a function looks up in its ``**others``, each as an optional parameter."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # written where no file is
        return {}
    found: dict[str, inspect.Parameter] = {}
    for node in ast.walk(tree):
        default: Any = None
        match node:
            case ast.Subscript(ast.Name(id=read), ast.Constant(str(name)), ast.Load()):
                pass
            case ast.Compare(ast.Constant(str(name)), [ast.In() | ast.NotIn()], [ast.Name(id=read)]):
                pass
            case ast.Call(ast.Attribute(ast.Name(id=read), "get" | "pop"), [ast.Constant(str(name)), *rest]):
                default = next((value.value for value in rest if isinstance(value, ast.Constant)), None)
            case _:
                continue
        if read == others and name.isidentifier():
            found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    return found


def called(module: nn.Module) -> Callable[..., Any]:
    """``forward``, or ``__call__`` where a module defines that in its place."""
    kind = type(module)
    in_its_place = kind.forward is nn.Module.forward and kind.__call__ is not nn.Module.__call__
    return module.__call__ if in_its_place else module.forward


def told_parameters(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Those of a method, or of the one function that its decorator hides behind ``(*args, **kwargs)``."""
    shown = inspect.signature(method).parameters
    if {parameter.kind for parameter in shown.values()} != _ANYTHING:
        return shown
    cells = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__closure__", None) or ()
    hidden = [cell.cell_contents for cell in cells if inspect.isfunction(cell.cell_contents)]
    if len(hidden) != 1:
        return shown
    return dict(itertools.islice(told_parameters(hidden[0]).items(), 1, None))  # the first is self


def required_parameters(module: nn.Module) -> set[str]:
    """The parameters without a default."""
    return {name for name, parameter in parameters(module).items() if parameter.default is parameter.empty}


def logits_switches(module: nn.Module) -> dict[str, bool]:
    """Optional arguments that ask for logits, such as get_logits, turned on, and for something in their place, off."""
    known = parameters(module).items()
    asking = {name: True for name, p in known if "logits" in name and (p.default is False or p.default is None)}
    return asking | {name: False for name, p in known if _INSTEAD_OF_LOGITS.fullmatch(name) and p.default is True}


def has_no(module: nn.Module, what: str) -> str:
    """That ``forward`` lacks a parameter; one with ``**kwargs`` may take it all the same, and does not name it."""
    kinds = {parameter.kind for parameter in inspect.signature(called(module)).parameters.values()}
    return f"forward {'names' if inspect.Parameter.VAR_KEYWORD in kinds else 'has'} no {what}"
