"""A small GPT-J: attention and MLP read the same LayerNorm, rotary embedding on the first part of every head."""

import math
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTJConfig:
    vocab_size: int = 512
    n_positions: int = 128
    n_embd: int = 64
    n_layer: int = 4
    n_head: int = 4
    rotary_pct: float = 0.5
    rotary_base: float = 10000.0
    n_inner: Optional[int] = None
    attn_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    pad_token_id: int = 0


@dataclass
class CausalLMOutput:
    logits: torch.Tensor
    loss: Optional[torch.Tensor] = None
    past_key_values: Optional[Tuple[Tuple[torch.Tensor, torch.Tensor], ...]] = None


def rotate_every_two(x):
    x1 = x[..., ::2]
    x2 = x[..., 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def apply_rotary_pos_emb(x, sin, cos):
    # x: (batch, seq, heads, rotary_dim); sin, cos: (batch, seq, rotary_dim // 2)
    sin = sin.repeat_interleave(2, dim=-1)[:, :, None, :]
    cos = cos.repeat_interleave(2, dim=-1)[:, :, None, :]
    return x * cos + rotate_every_two(x) * sin


class GPTJAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        if self.head_dim * self.num_heads != config.n_embd:
            raise ValueError("n_embd must be divisible by n_head")
        self.rotary_dim = max(2, int(self.head_dim * config.rotary_pct) // 2 * 2)
        if self.rotary_dim > self.head_dim:
            raise ValueError("heads are too small for a rotary embedding")
        self.scale_attn = math.sqrt(self.head_dim)
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.rotary_base = config.rotary_base

    def _split_heads(self, x):
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim)

    def _merge_heads(self, x):
        x = x.permute(0, 2, 1, 3).contiguous()
        return x.view(x.shape[0], x.shape[1], self.num_heads * self.head_dim)

    def _rotate(self, x, position_ids):
        exponent = torch.arange(0, self.rotary_dim, 2, device=x.device, dtype=torch.float32) / self.rotary_dim
        angles = position_ids[:, :, None].float() * self.rotary_base**-exponent
        rot = apply_rotary_pos_emb(x[..., : self.rotary_dim], angles.sin().to(x.dtype), angles.cos().to(x.dtype))
        return torch.cat((rot, x[..., self.rotary_dim :]), dim=-1)

    def forward(self, hidden_states, bias, position_ids, layer_past=None):
        query = self._rotate(self._split_heads(self.q_proj(hidden_states)), position_ids).permute(0, 2, 1, 3)
        key = self._rotate(self._split_heads(self.k_proj(hidden_states)), position_ids).permute(0, 2, 1, 3)
        value = self._split_heads(self.v_proj(hidden_states)).permute(0, 2, 1, 3)

        if layer_past is not None:
            key = torch.cat((layer_past[0], key), dim=-2)
            value = torch.cat((layer_past[1], value), dim=-2)
        present = (key, value)

        attn_weights = torch.matmul(query, key.transpose(-1, -2)) / self.scale_attn
        attn_weights = attn_weights.masked_fill(~bias, torch.finfo(attn_weights.dtype).min)
        attn_weights = self.attn_dropout(F.softmax(attn_weights, dim=-1))
        attn_output = self._merge_heads(torch.matmul(attn_weights, value))
        return self.out_proj(attn_output), present


class GPTJMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner_dim = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.fc_in = nn.Linear(config.n_embd, inner_dim)
        self.fc_out = nn.Linear(inner_dim, config.n_embd)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x), approximate="tanh"))


class GPTJBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config)
        self.mlp = GPTJMLP(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, bias, position_ids, layer_past=None):
        residual = hidden_states
        hidden_states = self.ln_1(hidden_states)
        attn_output, present = self.attn(hidden_states, bias, position_ids, layer_past)
        feed_forward = self.mlp(hidden_states)
        return residual + self.resid_dropout(attn_output + feed_forward), present


class GPTJForCausalLM(nn.Module):
    def __init__(self, config: GPTJConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList([GPTJBlock(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.gradient_checkpointing = False
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def gradient_checkpointing_enable(self):
        self.gradient_checkpointing = True

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, new_num_tokens):
        n = min(new_num_tokens, self.config.vocab_size)
        wte = nn.Embedding(new_num_tokens, self.config.n_embd).to(self.wte.weight)
        lm_head = nn.Linear(self.config.n_embd, new_num_tokens).to(self.lm_head.weight)
        self._init_weights(wte)
        self._init_weights(lm_head)
        with torch.no_grad():
            wte.weight[:n] = self.wte.weight[:n]
            lm_head.weight[:n] = self.lm_head.weight[:n]
            lm_head.bias[:n] = self.lm_head.bias[:n]
        self.wte, self.lm_head = wte, lm_head
        self.config.vocab_size = new_num_tokens
        return self.wte

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[Tuple] = None,
        use_cache: bool = False,
        labels: Optional[torch.LongTensor] = None,
    ) -> CausalLMOutput:
        batch_size, seq_length = input_ids.shape
        past_length = 0 if past_key_values is None else past_key_values[0][0].size(-2)
        total = past_length + seq_length
        if total > self.config.n_positions:
            raise ValueError(f"{total} tokens, but the model was made for {self.config.n_positions}")

        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length:]
            else:
                position_ids = torch.arange(past_length, total, device=input_ids.device).unsqueeze(0)
        position_ids = position_ids.expand(batch_size, seq_length)

        bias = torch.ones(total, total, dtype=torch.bool, device=input_ids.device).tril()
        bias = bias[None, None, past_length:total, :total]
        if attention_mask is not None:
            bias = bias & attention_mask[:, None, None, :].bool()

        hidden_states = self.wte(input_ids)
        presents = ()
        for i, block in enumerate(self.h):
            layer_past = past_key_values[i] if past_key_values is not None else None
            if self.gradient_checkpointing and self.training and not use_cache:
                hidden_states, present = checkpoint(
                    block, hidden_states, bias, position_ids, layer_past, use_reentrant=False
                )
            else:
                hidden_states, present = block(hidden_states, bias, position_ids, layer_past)
            if use_cache:
                presents = presents + (present,)
        logits = self.lm_head(self.ln_f(hidden_states))

        loss = None
        if labels is not None:
            shift_logits = logits[:, :-1, :].float()
            shift_labels = labels[:, 1:]
            loss = F.cross_entropy(
                shift_logits.reshape(-1, shift_logits.size(-1)), shift_labels.reshape(-1), ignore_index=-100
            )
        return CausalLMOutput(logits=logits, loss=loss, past_key_values=presents if use_cache else None)

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(t.index_select(0, beam_idx) for t in layer_past) for layer_past in past_key_values)

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=20,
        temperature=1.0,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=None,
        generator=None,
    ):
        was_training = self.training
        self.eval()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        finished = torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)
        past, step_ids = None, input_ids
        for _ in range(max_new_tokens):
            out = self(step_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[:, -1, :]
            if repetition_penalty != 1.0:
                seen = logits.gather(1, input_ids)
                seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
                logits = logits.scatter(1, input_ids, seen)
            if temperature == 0:
                next_token = logits.argmax(dim=-1)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = torch.topk(logits, min(top_k, logits.size(-1)))[0][:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                next_token = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator).squeeze(1)
            if eos_token_id is not None:
                next_token = torch.where(finished, torch.full_like(next_token, self.config.pad_token_id), next_token)
                finished = finished | (next_token == eos_token_id)
            input_ids = torch.cat((input_ids, next_token[:, None]), dim=1)
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(attention_mask.size(0), 1)), dim=1)
            step_ids = next_token[:, None]
            if eos_token_id is not None and finished.all():
                break
        self.train(was_training)
        return input_ids
