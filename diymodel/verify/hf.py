"""``hf:MODEL_TYPE``: a tiny random transformers model of that type, as a subject. Needs ``transformers``."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.failure import NotApplicable, SubjectError
from diymodel.verify.subject import Subject


def subject_of_type(model_type: str) -> Subject:
    """Tiny random transformers models of the type; configurations that do not fit it are refused.

    Raises:
        SubjectError: transformers is not installed, or has no causal language model of that type.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    except ImportError:
        raise SubjectError(f"hf:{model_type} needs transformers: pip install 'diymodel[hf]'") from None
    if model_type not in CAUSAL:
        nearest = difflib.get_close_matches(model_type, CAUSAL, n=1, cutoff=0.0)[0]
        raise SubjectError(
            f"transformers has no causal language model of type {model_type!r}; the nearest is {nearest!r}"
        )

    def build(config: DIYConfig) -> nn.Module:
        known = AutoConfig.for_model(model_type)
        try:
            hf_config = AutoConfig.for_model(model_type, **_fields(config, known))
            model: nn.Module = AutoModelForCausalLM.from_config(hf_config)  # type: ignore[no-untyped-call]
        except Exception as error:  # each of hundreds of families has limits of its own
            raise NotImplementedError(f"{type(error).__name__}: {error}") from error
        return model

    return Subject(build, f"hf:{model_type}", claims=("left_padding",), shifted=_shifted)


def _shifted(module: nn.Module, input_ids: Tensor, offset: int) -> Tensor:
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise NotApplicable("forward has no position_ids")
    if getattr(module.config, "rope_parameters", None) is None:
        raise NotApplicable("the positions are not rotary")
    positions = torch.arange(offset, offset + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    logits: Tensor = module(input_ids, position_ids=positions).logits
    return logits


def _fields(config: DIYConfig, known: Any) -> dict[str, Any]:
    """Our configuration in transformers' words, as far as the type knows them."""
    names = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "query_pre_attn_scalar": config.head_size,  # Gemma's own scale
        "is_decoder": True,  # encoder families are causal only then
    }
    dropouts = dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields = {name: value for name, value in (names | dropouts | tokens).items() if hasattr(known, name)}
    rotary = getattr(known, "rope_parameters", None)
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        # All of the head, where a quarter of a tiny one would be no rotary position at all.
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in rotary else {}
        fields["rope_parameters"] = {**rotary, "rope_theta": config.rope_theta, **whole}
    return fields
