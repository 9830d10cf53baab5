"""modeling_minimix.py: a decoder in the form of a Hugging Face modelling file that does not need the library.

Grouped-query attention with norms on queries and keys; every other layer, the first included, has a sliding window of
`sliding_window` tokens, the token itself counted. The cache object that is passed in is the one that is filled.
"""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass
class MiniMixConfig:
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    max_position_embeddings: int = 2048
    sliding_window: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    pad_token_id: Optional[int] = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    _attn_implementation: str = "sdpa"  # or "eager"

    @property
    def layer_types(self):
        return ["full_attention" if i % 2 else "sliding_attention" for i in range(self.num_hidden_layers)]


@dataclass
class CausalLMOutputWithPast:
    loss: Optional[torch.Tensor] = None
    logits: Optional[torch.Tensor] = None
    past_key_values: Optional["DynamicCache"] = None


class DynamicCache:
    """Keys and values by layer. A layer with a window keeps the last window - 1 tokens: all that the next one can see."""

    def __init__(self, config):
        self.windows = [config.sliding_window if t == "sliding_attention" else None for t in config.layer_types]
        self.key_cache = [None] * len(self.windows)
        self.value_cache = [None] * len(self.windows)
        self._seen_tokens = 0

    def get_seq_length(self):
        return self._seen_tokens

    def update(self, key_states, value_states, layer_idx):
        if layer_idx == len(self.windows) - 1:
            self._seen_tokens += key_states.shape[-2]
        if self.key_cache[layer_idx] is not None:
            key_states = torch.cat([self.key_cache[layer_idx], key_states], dim=-2)
            value_states = torch.cat([self.value_cache[layer_idx], value_states], dim=-2)
        start = 0
        if self.windows[layer_idx] is not None:
            start = max(0, key_states.shape[-2] - self.windows[layer_idx] + 1)
        self.key_cache[layer_idx] = key_states[:, :, start:]
        self.value_cache[layer_idx] = value_states[:, :, start:]
        return key_states, value_states

    def reorder_cache(self, beam_idx):
        for i in range(len(self.key_cache)):
            self.key_cache[i] = self.key_cache[i].index_select(0, beam_idx)
            self.value_cache[i] = self.value_cache[i].index_select(0, beam_idx)


class MiniMixRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class MiniMixRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.base = config.rope_theta

    @torch.no_grad()
    def forward(self, x, position_ids):
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64, device=x.device).double() / self.dim
        freqs = position_ids[:, None, :, None].double() / self.base**exponent
        emb = torch.cat((freqs, freqs), dim=-1)
        return emb.cos().to(x.dtype), emb.sin().to(x.dtype)


def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin):
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_attention(query, key, value, mask, scaling):
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    attn_weights = attn_weights.masked_fill(~mask, torch.finfo(attn_weights.dtype).min)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.matmul(attn_weights.to(query.dtype), value)


def sdpa_attention(query, key, value, mask, scaling):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


class MiniMixAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = MiniMixRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = MiniMixRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, mask, past_key_values=None):
        batch, seq_length = hidden_states.shape[:2]
        shape = (batch, seq_length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask = mask[..., mask.shape[-1] - key.shape[-2] :]  # what a windowed cache has dropped no query can see
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        attend = eager_attention if self.config._attn_implementation == "eager" else sdpa_attention
        attn_output = attend(query, key, value, mask, self.scaling)
        return self.o_proj(attn_output.transpose(1, 2).reshape(batch, seq_length, -1))


class MiniMixMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MiniMixDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = MiniMixAttention(config, layer_idx)
        self.mlp = MiniMixMLP(config)
        self.input_layernorm = MiniMixRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MiniMixRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings, mask, past_key_values=None):
        residual = hidden_states
        hidden_states = self.self_attn(self.input_layernorm(hidden_states), position_embeddings, mask, past_key_values)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def causal_masks(attention_mask, past, seq_length, window, device):
    """{layer type: bool (batch or 1, 1, seq, past + seq)}, True where a query may look."""
    q_idx = torch.arange(past, past + seq_length, device=device)[:, None]
    kv_idx = torch.arange(past + seq_length, device=device)[None, :]
    causal = (kv_idx <= q_idx)[None, None]
    if attention_mask is not None:
        causal = causal & attention_mask[:, None, None, :].bool()
    itself = kv_idx == q_idx  # so that a padded query has one key, and no NaN
    return {
        "full_attention": causal | itself,
        "sliding_attention": (causal & (q_idx - kv_idx < window)) | itself,
    }


class MiniMixForCausalLM(nn.Module):
    def __init__(self, config: MiniMixConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniMixDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MiniMixRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MiniMixRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def gradient_checkpointing_enable(self):
        self.gradient_checkpointing = True

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, new_num_tokens):
        kept = min(new_num_tokens, self.config.vocab_size)
        old_in, old_out = self.embed_tokens, self.lm_head
        self.embed_tokens = nn.Embedding(new_num_tokens, self.config.hidden_size).to(old_in.weight)
        self.lm_head = nn.Linear(self.config.hidden_size, new_num_tokens, bias=False).to(old_out.weight)
        for new, old in ((self.embed_tokens, old_in), (self.lm_head, old_out)):
            self._init_weights(new)
            new.weight.data[:kept] = old.weight.data[:kept]
        self.config.vocab_size = new_num_tokens
        self.tie_weights()
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[DynamicCache] = None,
        labels: Optional[torch.LongTensor] = None,
        use_cache: Optional[bool] = None,
        num_items_in_batch: Optional[int] = None,
    ) -> CausalLMOutputWithPast:
        """attention_mask: (batch, past + seq), 1 at tokens, 0 at padding, on the left where a cache follows. labels are
        shifted here, -100 is ignored; num_items_in_batch: the labels of all micro-batches of a step, whose losses then
        add up to its mean.
        """
        batch, seq_length = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past + seq_length > self.config.max_position_embeddings:
            raise ValueError(f"{past + seq_length} tokens > max_position_embeddings")
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            else:
                position_ids = torch.arange(past, past + seq_length, device=input_ids.device).unsqueeze(0)

        hidden_states = self.embed_tokens(input_ids)
        masks = causal_masks(attention_mask, past, seq_length, self.config.sliding_window, input_ids.device)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.layer_types):
            if self.gradient_checkpointing and self.training and past_key_values is None:
                hidden_states = checkpoint(
                    layer, hidden_states, position_embeddings, masks[layer_type], past_key_values, use_reentrant=False
                )
            else:
                hidden_states = layer(hidden_states, position_embeddings, masks[layer_type], past_key_values)
        logits = self.lm_head(self.norm(hidden_states))

        loss = None
        if labels is not None:
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            upcast = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(upcast.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
            items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss / items
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=20, eos_token_id=None, use_cache=True):
        """Greedy. Prompts are padded on the left; after eos_token_id a row gets pad_token_id, or eos_token_id again."""
        was_training = self.training
        self.eval()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else eos_token_id
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        past_key_values = DynamicCache(self.config) if use_cache else None
        for step in range(max_new_tokens):
            model_inputs = input_ids[:, -1:] if use_cache and step > 0 else input_ids
            outputs = self(model_inputs, attention_mask=attention_mask, past_key_values=past_key_values)
            next_tokens = outputs.logits[:, -1].argmax(dim=-1)
            if eos_token_id is not None:
                next_tokens = torch.where(unfinished, next_tokens, pad)
                unfinished = unfinished & (next_tokens != eos_token_id)
            input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=-1)
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones((len(input_ids), 1))], dim=-1)
            if not unfinished.any():
                break
        self.train(was_training)
        return input_ids


def build(config):
    return MiniMixForCausalLM(
        MiniMixConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size or 2 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads or config.num_heads,
            max_position_embeddings=config.max_seq_len,
            sliding_window=4,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            pad_token_id=config.pad_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
