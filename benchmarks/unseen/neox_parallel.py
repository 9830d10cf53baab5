"""GPT-NeoX without the library: parallel residual, a quarter of each head rotated, one matrix for queries, keys and values.

The interface is that of transformers before there were cache classes: past_key_values is a tuple with a tuple (key, value)
for each layer, and use_cache asks for it back. Prompts of different lengths are padded on the left.
"""

from collections import namedtuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

NeoXOutput = namedtuple("NeoXOutput", ["loss", "logits", "past_key_values"], defaults=[None, None, None])


class NeoXConfig:
    model_type = "gpt_neox"

    def __init__(self, vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=None,
                 rotary_pct=0.5, rotary_emb_base=10000, max_position_embeddings=128, layer_norm_eps=1e-5,
                 initializer_range=0.02, hidden_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False,
                 pad_token_id=None, attn_implementation="sdpa"):  # fmt: skip
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.tie_word_embeddings = tie_word_embeddings
        self.pad_token_id = pad_token_id
        self.attn_implementation = attn_implementation


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, base):
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, position_ids, dtype):
        with torch.autocast(position_ids.device.type, enabled=False):
            exponents = torch.arange(0, self.dim, 2, device=position_ids.device, dtype=torch.float64) / self.dim
            angles = position_ids.double().unsqueeze(-1) * self.base**-exponents
            emb = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # (batch, 1, seq, dim)
        return emb.cos().to(dtype), emb.sin().to(dtype)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class NeoXAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // self.num_heads
        self.rotary_ndims = max(2, int(self.head_size * config.rotary_pct) // 2 * 2)
        self.rotary_emb = RotaryEmbedding(self.rotary_ndims, config.rotary_emb_base)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm_factor = self.head_size**-0.5

    def forward(self, hidden_states, attention_mask, position_ids, layer_past=None, use_cache=False):
        batch, seq, _ = hidden_states.shape
        # [batch, seq, (heads * 3 * head_size)] -> 3 x [batch, heads, seq, head_size]
        qkv = self.query_key_value(hidden_states).view(batch, seq, self.num_heads, 3 * self.head_size)
        query, key, value = qkv.transpose(1, 2).chunk(3, dim=-1)
        cos, sin = self.rotary_emb(position_ids, query.dtype)
        query_rot, query_pass = query[..., : self.rotary_ndims], query[..., self.rotary_ndims :]
        key_rot, key_pass = key[..., : self.rotary_ndims], key[..., self.rotary_ndims :]
        query = torch.cat((query_rot * cos + rotate_half(query_rot) * sin, query_pass), dim=-1)
        key = torch.cat((key_rot * cos + rotate_half(key_rot) * sin, key_pass), dim=-1)
        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=-2)
            value = torch.cat((layer_past[1], value), dim=-2)
        present = (key, value) if use_cache else None

        p = self.config.attention_dropout if self.training else 0.0
        if self.config.attn_implementation == "sdpa" and p == 0.0:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=self.norm_factor)
        else:
            scores = torch.matmul(query, key.transpose(-1, -2)) * self.norm_factor
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
            weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
            weights = F.dropout(weights, p=p, training=self.training)
            context = torch.matmul(weights, value)
        context = context.transpose(1, 2).reshape(batch, seq, self.num_heads * self.head_size)
        return self.dense(context), present


class NeoXLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_dropout = nn.Dropout(config.hidden_dropout)
        self.post_mlp_dropout = nn.Dropout(config.hidden_dropout)
        self.attention = NeoXAttention(config)
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_ids, layer_past=None, use_cache=False):
        attn_output, present = self.attention(
            self.input_layernorm(hidden_states), attention_mask, position_ids, layer_past, use_cache
        )
        mlp_output = self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(self.post_attention_layernorm(hidden_states))))
        # parallel residual: x = x + attn(ln1(x)) + mlp(ln2(x))
        hidden_states = self.post_mlp_dropout(mlp_output) + self.post_attention_dropout(attn_output) + hidden_states
        return hidden_states, present


class NeoXForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_in = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList([NeoXLayer(config) for _ in range(config.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.embed_out.weight = self.embed_in.weight

    def get_input_embeddings(self):
        return self.embed_in

    def get_output_embeddings(self):
        return self.embed_out

    def resize_token_embeddings(self, new_num_tokens):
        old_in, old_out = self.embed_in, self.embed_out
        n = min(old_in.num_embeddings, new_num_tokens)
        self.embed_in = nn.Embedding(new_num_tokens, self.config.hidden_size).to(old_in.weight)
        self.embed_out = nn.Linear(self.config.hidden_size, new_num_tokens, bias=False).to(old_out.weight)
        self._init_weights(self.embed_in)
        self._init_weights(self.embed_out)
        with torch.no_grad():
            self.embed_in.weight[:n] = old_in.weight[:n]
            self.embed_out.weight[:n] = old_out.weight[:n]
        self.config.vocab_size = new_num_tokens
        self.tie_weights()
        return self.embed_in

    def gradient_checkpointing_enable(self):
        self.gradient_checkpointing = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None, use_cache=False):
        """attention_mask: (batch, past + seq), 1 for tokens; labels like input_ids, shifted here, -100 does not count."""
        batch, seq = input_ids.shape
        past_length = past_key_values[0][0].shape[-2] if past_key_values is not None else 0
        total = past_length + seq
        if total > self.config.max_position_embeddings:
            raise ValueError(f"{total} is more than max_position_embeddings={self.config.max_position_embeddings}")
        query_idx = torch.arange(past_length, total, device=input_ids.device)
        key_idx = torch.arange(total, device=input_ids.device)
        allowed = (key_idx[None, :] <= query_idx[:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None, :]
            allowed = allowed | (key_idx[None, :] == query_idx[:, None])  # padding sees itself, or sdpa gives nan
        if position_ids is None:
            position_ids = query_idx.unsqueeze(0)
            if attention_mask is not None:
                position_ids = attention_mask.long().cumsum(-1) - 1
                position_ids = position_ids.clamp(min=0)[:, -seq:]

        hidden_states = self.emb_dropout(self.embed_in(input_ids))
        presents = ()
        for i, layer in enumerate(self.layers):
            layer_past = past_key_values[i] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training:
                hidden_states, present = torch.utils.checkpoint.checkpoint(
                    layer, hidden_states, allowed, position_ids, layer_past, use_cache, use_reentrant=False
                )
            else:
                hidden_states, present = layer(hidden_states, allowed, position_ids, layer_past, use_cache)
            presents += (present,)
        logits = self.embed_out(self.final_layer_norm(hidden_states))

        loss = None
        if labels is not None:
            shift_logits = logits[:, :-1, :].to(torch.promote_types(logits.dtype, torch.float32))
            shift_labels = labels[:, 1:]
            loss = F.cross_entropy(
                shift_logits.reshape(-1, shift_logits.size(-1)), shift_labels.reshape(-1), ignore_index=-100, reduction="sum"
            )
            loss = loss / (shift_labels != -100).sum().clamp(min=1)
        return NeoXOutput(loss, logits, presents if use_cache else None)

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(t.index_select(0, beam_idx) for t in layer_past) for layer_past in past_key_values)

    def prepare_inputs_for_generation(self, input_ids, attention_mask, past_key_values, use_cache):
        if past_key_values is not None:
            input_ids = input_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, max_new_tokens=16, do_sample=False, temperature=1.0, top_k=0,
                 top_p=1.0, repetition_penalty=1.0, num_beams=1, eos_token_id=None, use_cache=True):  # fmt: skip
        """Prompt and continuation. Rows that are done get pad_token_id (eos_token_id without one)."""
        if input_ids.shape[1] + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError("prompt and max_new_tokens exceed max_position_embeddings")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        was_training = self.training
        self.eval()
        if num_beams > 1:
            out = self._beam_search(input_ids, attention_mask, max_new_tokens, num_beams, use_cache)
            self.train(was_training)
            return out
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else eos_token_id
        running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        past = None
        for _ in range(max_new_tokens):
            out = self(**self.prepare_inputs_for_generation(input_ids, attention_mask, past, use_cache))
            past = out.past_key_values
            logits = out.logits[:, -1].to(torch.promote_types(out.logits.dtype, torch.float32))
            if repetition_penalty != 1.0:
                score = logits.gather(1, input_ids)
                score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
                real = torch.zeros_like(logits).scatter_add(1, input_ids, attention_mask.to(logits.dtype)) > 0
                logits = torch.where(real, logits.scatter(1, input_ids, score), logits)
            if do_sample and temperature > 0:
                next_tokens = self._sample(logits / temperature, top_k, top_p)
            else:
                next_tokens = logits.argmax(-1)
            if eos_token_id is not None:
                next_tokens = next_tokens.masked_fill(~running, pad)
                running = running & next_tokens.ne(eos_token_id)
            input_ids = torch.cat((input_ids, next_tokens[:, None]), dim=-1)
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(input_ids), 1)), dim=-1)
            if not running.any():
                break
        self.train(was_training)
        return input_ids

    @staticmethod
    def _sample(logits, top_k, top_p):
        if top_k > 0:
            kth = torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        if top_p < 1.0:
            sorted_logits, sorted_indices = torch.sort(logits, descending=True)
            cumulative = sorted_logits.softmax(dim=-1).cumsum(dim=-1)
            remove = cumulative > top_p
            remove[..., 1:] = remove[..., :-1].clone()
            remove[..., 0] = False
            logits = logits.masked_fill(remove.scatter(1, sorted_indices, remove), float("-inf"))
        return torch.multinomial(F.softmax(logits, dim=-1), 1).squeeze(1)

    def _beam_search(self, input_ids, attention_mask, max_new_tokens, num_beams, use_cache):
        """The likeliest of num_beams continuations of each row, all of the same length."""
        batch = input_ids.shape[0]
        input_ids = input_ids.repeat_interleave(num_beams, dim=0)
        attention_mask = attention_mask.repeat_interleave(num_beams, dim=0)
        scores = torch.full((batch, num_beams), -1e9, device=input_ids.device)
        scores[:, 0] = 0.0  # or all beams would be the same
        first = torch.arange(batch, device=input_ids.device)[:, None] * num_beams
        past = None
        for _ in range(max_new_tokens):
            out = self(**self.prepare_inputs_for_generation(input_ids, attention_mask, past, use_cache))
            logp = F.log_softmax(out.logits[:, -1], dim=-1).view(batch, num_beams, -1)
            vocab = logp.size(-1)
            scores, best = (scores[..., None] + logp).view(batch, -1).topk(num_beams, dim=-1)
            beam_idx = (first + best // vocab).view(-1)
            input_ids = torch.cat((input_ids[beam_idx], (best % vocab).view(-1, 1)), dim=-1)
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(input_ids), 1)), dim=-1)
            if out.past_key_values is not None:
                past = self._reorder_cache(out.past_key_values, beam_idx)
        return input_ids.view(batch, num_beams, -1)[:, 0]


def build(config):
    return NeoXForCausalLM(
        NeoXConfig(
            config.vocab_size,
            config.hidden_size,
            config.num_layers,
            config.num_heads,
            config.intermediate_size,
            rotary_emb_base=config.rope_theta,
            max_position_embeddings=config.max_seq_len,
            hidden_dropout=config.dropout,
            attention_dropout=config.dropout,
            tie_word_embeddings=config.tie_word_embeddings,
            pad_token_id=config.pad_token_id,
        )
    )
