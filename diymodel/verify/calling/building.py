"""How a stranger's class is told its sizes: by the names that people give them.

For a class that cannot be built of a configuration with our names: ``GPT(vocab_size, d_model, n_heads, …)``,
``GPT(GPTConfig(n_embd=…))``, ``GPTModel({"emb_dim": …})``, or ``GPT()``.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from diymodel.config import DIYConfig
from diymodel.verify.failure import SubjectError

SIZE_NAMES = {  # of ours: theirs
    "vocab_size": (
        *("vocab_size", "n_vocab", "vocab", "vocabulary_size", "num_tokens", "n_tokens", "ntoken", "words"),
        *("num_embeddings", "num_vocab", "vocab_len", "vocab_length", "voc_size", "n_token", "num_words", "n_words"),
        "padded_vocab_size",
    ),
    "num_layers": (
        *("num_layers", "n_layers", "n_layer", "num_hidden_layers", "nlayers", "layers", "depth", "num_blocks"),
        *("n_blocks", "num_decoder_layers", "number_of_layers"),
        *("num_layer", "layer_num", "n_block", "num_block"),
        *("num_decoder_blocks", "n_decoder_layers", "n_decoder_blocks"),
        *("num_transformer_layers", "n_transformer_layers", "num_transformer_blocks", "n_transformer_blocks"),
    ),
    "hidden_size": (
        *("hidden_size", "d_model", "n_embd", "n_embed", "dim", "embed_dim", "emb_dim", "embedding_dim", "emb_size"),
        *("embed_size", "embedding_size", "model_dim", "d_embed", "dim_model", "embeddings_size", "dims"),
        *("embd_size", "embd_dim", "n_emb", "n_embs", "n_embds", "n_embeds", "n_embedding", "d_emb"),
        *("d_embd", "d_embedding", "dim_emb", "dim_embd", "dim_embed", "dim_embedding", "num_embd", "num_embed"),
        *("emb_dims", "embd_dims", "embed_dims", "embedding_dims", "n_dim", "n_dims", "n_model", "model_size"),
        *("model_width", "hidden_dims", "num_hiddens", "ninp"),
    ),
    "num_heads": (
        *("num_heads", "n_heads", "n_head", "num_attention_heads", "nhead", "nheads", "heads", "num_head", "head_num"),
        *("attn_heads", "n_attn_heads", "num_attn_heads", "attention_heads", "n_attention_heads", "number_of_heads"),
        *("n_q_heads", "num_q_heads", "n_query_heads", "num_query_heads"),
    ),
    "num_kv_heads": (
        *("num_kv_heads", "n_kv_heads", "n_kv_head", "num_key_value_heads", "n_kv_groups", "kv_heads", "num_kv_head"),
        *("num_kv_groups", "n_key_value_heads", "n_query_groups", "num_query_groups"),
    ),
    "intermediate_size": (
        *("intermediate_size", "d_ff", "ffn_dim", "ff_dim", "dff", "dim_feedforward", "mlp_dim", "ffn_hidden_size"),
        *("ffn_size", "n_inner", "ffn_hidden_dim", "ff_hidden_dim", "mlp_hidden_dim", "d_inner", "hidden_features"),
        *("d_ffn", "d_mlp", "d_hid", "nhid", "n_ff", "n_ffn", "dim_ff", "dim_ffn", "d_feedforward", "ff_size"),
        *("feedforward_dim", "feed_forward_dim", "feedforward_size"),
        *("feed_forward_size", "mlp_size", "mlp_hidden_size"),
        *("intermediate_dim", "d_intermediate", "ffn_num_hiddens"),
    ),
    "max_seq_len": (
        *("max_seq_len", "block_size", "context_length", "max_len", "seq_len", "max_position_embeddings", "max_length"),
        *("n_positions", "n_ctx", "ctx_len", "sequence_length", "context_size", "max_seq_length", "seq_length"),
        *("max_sequence_length", "context_len", "max_context", "context_window", "max_positions", "num_max_positions"),
        *("max_seqlen", "seqlen", "maxlen", "max_sequence_len", "sequence_len", "max_position", "num_positions"),
        *("max_context_len", "max_context_length", "max_context_size", "ctx_size"),
        *("ctx_length", "n_context", "max_ctx"),
        *("max_block_size", "block_len", "block_length"),
    ),
    "dropout": (
        *("dropout", "dropout_rate", "drop_rate", "dropout_p", "p_drop", "dropout_prob", "p_dropout", "attn_dropout"),
        *("resid_pdrop", "attn_pdrop", "embd_pdrop", "attention_dropout", "resid_dropout", "emb_dropout", "drop_prob"),
        *("pdrop", "drop_p", "dropout_ratio", "dropout_probability", "hidden_dropout", "hidden_dropout_prob"),
        *("attn_drop", "attn_dropout_prob", "attention_probs_dropout_prob", "attention_dropout_prob", "embd_dropout"),
        *("embed_dropout", "embedding_dropout", "residual_dropout", "ff_dropout", "ffn_dropout", "mlp_dropout"),
    ),
    "rms_norm_eps": (
        *("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rms_eps", "eps", "epsilon", "ln_eps"),
        *("layernorm_eps", "layernorm_epsilon", "rmsnorm_eps", "norm_epsilon"),
    ),
    "rope_theta": ("rope_theta", "rope_base", "theta", "rotary_base", "rotary_theta", "rotary_emb_base"),
    "tie_word_embeddings": (
        *("tie_word_embeddings", "tie_weights", "weight_tying", "tie_embeddings", "tied_embedding", "tie_embedding"),
        *("tied_embeddings", "tie_word_embedding", "tied_weights"),
    ),
    "pad_token_id": (
        *("pad_token_id", "pad_id", "pad_idx", "padding_idx", "pad_token", "pad_index", "padding_id", "pad_token_idx"),
    ),
    "head_size": ("head_size", "head_dim", "d_head", "dim_head", "d_k", "d_v", "d_kv", "dim_per_head"),
}
_OURS = {theirs: ours for ours, names in SIZE_NAMES.items() for theirs in names}
_EITHER = "hidden_dim"  # the model's width, or its MLP's where another name says the model's
_SWITCH = re.compile(r"(\w+_)?bias|use_\w+")  # off, where nothing says what it is by default
_CONFIGURATION = re.compile(r"(config|configuration|args|arguments|params|hparams|hyperparameters|settings)$", re.I)
_UNFIT = (AttributeError, KeyError, TypeError)  # what a constructor raises that wanted something else
_REFUSED = (AssertionError, ValueError, RuntimeError, ZeroDivisionError)  # or other sizes


class ByNames:
    """A factory ``config -> nn.Module`` of a class that names its sizes itself.

    Sizes that the class does not take by any known name stay as they are by default. What it cannot be built of
    (assertions and the like) is refused by NotImplementedError, as other factories do.
    """

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        self._make = make
        self.said = ""  # how the last one was built, in a few words

    def __call__(self, config: DIYConfig) -> nn.Module:
        """The module of a configuration.

        Raises:
            NotImplementedError: the constructor refuses these sizes.
            SubjectError: it needs an argument of an unknown name.
        """
        try:
            return self._built(config)
        except (NotImplementedError, SubjectError):
            raise
        except _REFUSED as error:
            raise NotImplementedError(f"{type(error).__name__}: {error}") from error

    def _built(self, config: DIYConfig) -> nn.Module:
        unfit: Exception | None = None
        for arguments, said in _ways(self._make, config):
            try:
                module = self._make(**arguments)
            except _UNFIT as error:
                unfit = unfit or error
                continue
            self.said = f"{self._make.__name__}({said})"
            return module
        assert unfit is not None
        raise unfit


def _ways(make: Callable[..., nn.Module], config: DIYConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Arguments of the constructor, and how a reader is told of them; several where it wants a configuration."""
    known = _parameters(make)
    required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    whole = next(iter([*required, *known]), None)
    if whole is None or whole in _OURS or whole == _EITHER or not (len(required) == 1 or _CONFIGURATION.search(whole)):
        yield _called(known, config)
        return
    others, said = _called({name: parameter for name, parameter in known.items() if name != whole}, config)
    for made, how in _configurations(make, known[whole], config):
        yield {whole: made, **others}, ", ".join(filter(None, (how, said)))


def _configurations(
    make: Callable[..., nn.Module], parameter: inspect.Parameter, config: DIYConfig
) -> Iterator[tuple[Any, str]]:
    """What a constructor may want as its configuration: an object of the class beside it, or any with such names."""
    beside = _beside(make)
    hinted = _hint(make, parameter.name)
    kinds = [hinted] if inspect.isclass(hinted) and hinted.__module__ != "builtins" else []
    named_so = [found for found in beside.values() if inspect.isclass(found) and _CONFIGURATION.search(found.__name__)]
    sizes = {kind: sum(name in _OURS for name in _fields(kind)) for kind in named_so}
    kinds += sorted(filter(sizes.__getitem__, named_so), key=lambda kind: -sizes[kind])
    for kind in kinds:
        try:
            made, said = _configured(kind, config)
        except (SubjectError, *_UNFIT):  # it needs more, and the constructor perhaps another
            continue
        yield made, f"{kind.__name__}({said})"
    given = [found for found in beside.values() if isinstance(found, Mapping) and any(name in _OURS for name in found)]
    defaults: dict[str, Any] = dict(given[0]) if given else {}
    values = _values(_named(defaults or _words(make)), config)
    yield _Named(defaults | values), f"a configuration with {_said(values) if defaults else 'the usual names'}"


def _configured(kind: type, config: DIYConfig) -> tuple[Any, str]:
    """An object of a class of configurations, and how a reader is told of it."""
    if parameters := _parameters(kind):
        arguments, said = _called(parameters, config)
        return kind(**arguments), said
    values = _values(_named(_fields(kind)), config)
    try:
        made = kind(**values)  # class Config: def __init__(self, **settings) …
    except TypeError:
        made = kind()  # class Config: n_embd = 64 …
        for name, value in values.items():
            setattr(made, name, value)
    return made, _said(values)


class _Named(dict[str, Any]):
    """Sizes by key and by attribute alike."""

    def __missing__(self, name: str) -> int:
        if (otherwise := _otherwise(name)) is None:
            raise KeyError(name)
        return otherwise

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a configuration with no known size named {name!r}") from None


def _called(parameters: Mapping[str, inspect.Parameter], config: DIYConfig) -> tuple[dict[str, Any], str]:
    """Arguments for the parameters that name a size, and how a reader is told of them."""
    values = _values(_named(parameters), config)
    said = [_said(values)]
    if "device" in parameters:
        values["device"] = "cpu"
    lacking = [name for name, p in parameters.items() if p.default is p.empty and name not in values]
    if unknown := [name for name in lacking if _otherwise(name) is None]:
        *others, last = unknown
        if others:
            names = f"{', '.join(others)} and {last}"
            raise SubjectError(f"its arguments {names} are not names of sizes that are known here: give them defaults")
        raise SubjectError(f"its argument {last} is not the name of a size that is known here: give it a default")
    values |= {name: _otherwise(name) for name in lacking}
    return values, ", ".join(filter(None, [*said, *(f"{name}={values[name]}" for name in lacking)]))


def _otherwise(name: str) -> int | None:
    """What a constructor is given that asks for a token of padding, where there is none, or for a switch."""
    if _OURS.get(name) == "pad_token_id":
        return 0
    return False if _SWITCH.fullmatch(name) else None


def _named(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that are known, and our name for each."""
    names = set(names)
    named = {name: _OURS[name] for name in sorted(names & _OURS.keys())}
    if _EITHER in names:
        named[_EITHER] = "intermediate_size" if "hidden_size" in named.values() else "hidden_size"
    return named


def _values(named: Mapping[str, str], config: DIYConfig) -> dict[str, Any]:
    """The sizes of a configuration that it has, by their names."""
    sizes = {
        **config.to_dict(),
        "num_kv_heads": config.kv_heads,
        "intermediate_size": config.mlp_size,
        "head_size": config.head_size,
    }
    return {theirs: sizes[ours] for theirs, ours in named.items() if sizes[ours] is not None}


def _said(names: Iterable[str]) -> str:
    ours = _named(names)
    return ", ".join(theirs if theirs == ours[theirs] else f"{theirs}={ours[theirs]}" for theirs in ours)


def _parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those that can be given by name."""
    known = inspect.signature(make).parameters.items()
    return {name: p for name, p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _fields(kind: type) -> set[str]:
    """Names that the objects of a class have, by its constructor or as they are."""
    written = {*vars(kind), *getattr(kind, "__annotations__", ())}
    return {*_parameters(kind), *(name for name in written if not name.startswith("_"))}


@functools.cache
def _words(make: Callable[..., nn.Module]) -> set[str]:
    """Those in the file of a class or function; all names that are known, where there is none to read."""
    try:
        return set(re.findall(r"\w+", inspect.getsource(sys.modules[make.__module__])))
    except (KeyError, OSError, TypeError):
        return {*_OURS, _EITHER}


def _beside(make: Callable[..., nn.Module]) -> dict[str, Any]:
    """What stands in the file of a class or function, and was written there."""
    names = vars(sys.modules[make.__module__]) if make.__module__ in sys.modules else getattr(make, "__globals__", {})
    return {
        name: found
        for name, found in names.items()
        if not name.startswith("__") and getattr(found, "__module__", make.__module__) == make.__module__
    }


def _hint(make: Callable[..., nn.Module], name: str) -> Any:
    try:
        return typing.get_type_hints(make.__init__ if inspect.isclass(make) else make).get(name)
    except Exception:  # names that are not there, syntax of later versions
        return None
