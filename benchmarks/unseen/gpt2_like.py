"""GPT-2 written down again: learned positions, fused qkv, LayerNorm with bias, tied head, one (k, v) pair a layer."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.num_heads
        self.d_head = config.hidden_size // config.num_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def split_heads(self, t):
        return t.view(t.size(0), t.size(1), self.n_head, self.d_head).transpose(1, 2)

    def merge_heads(self, t):
        return t.transpose(1, 2).reshape(t.size(0), t.size(2), self.n_head * self.d_head)

    def forward(self, x, layer_past=None, attention_mask=None):
        query, key, value = self.c_attn(x).chunk(3, dim=-1)
        query, key, value = self.split_heads(query), self.split_heads(key), self.split_heads(value)
        if layer_past is not None:
            past_key, past_value = layer_past
            key = torch.cat((past_key, key), dim=2)
            value = torch.cat((past_value, value), dim=2)
        present = (key, value)

        n_query, n_key = query.size(2), key.size(2)
        scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(self.d_head)
        allowed = torch.ones(n_query, n_key, dtype=torch.bool, device=x.device).tril(diagonal=n_key - n_query)
        allowed = allowed[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = self.attn_dropout(F.softmax(scores, dim=-1))
        out = self.c_proj(self.merge_heads(torch.matmul(weights, value)))
        return self.resid_dropout(out), present


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x, layer_past=None, attention_mask=None):
        attended, present = self.attn(self.ln_1(x), layer_past, attention_mask)
        x = x + attended
        x = x + self.mlp(self.ln_2(x))
        return x, present


class GPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_positions = config.max_seq_len
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_layers))
        self.tie_weights()

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def tie_weights(self):
        self.lm_head.weight = self.wte.weight

    def resize_token_embeddings(self, new_num_tokens):
        old = self.wte.weight.data
        new = nn.Embedding(new_num_tokens, old.size(1), device=old.device, dtype=old.dtype)
        self._init_weights(new)
        keep = min(old.size(0), new_num_tokens)
        new.weight.data[:keep] = old[:keep]
        self.wte = new
        self.lm_head = nn.Linear(old.size(1), new_num_tokens, bias=False, device=old.device, dtype=old.dtype)
        self.tie_weights()
        return self.wte

    def reorder_cache(self, past, beam_idx):
        return [tuple(t.index_select(0, beam_idx) for t in layer) for layer in past]

    def forward(
        self, input_ids, layer_past=None, attention_mask=None, position_ids=None, labels=None, use_cache=False
    ):
        n_past = layer_past[0][0].size(2) if layer_past is not None else 0
        n_new = input_ids.size(1)
        if n_past + n_new > self.n_positions:
            raise ValueError(f"{n_past} cached and {n_new} new tokens are more than {self.n_positions}")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:]
        elif position_ids is None:
            position_ids = torch.arange(n_past, n_past + n_new, device=input_ids.device)

        x = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        presents = []
        for i, block in enumerate(self.blocks):
            x, present = block(x, layer_past[i] if layer_past is not None else None, attention_mask)
            presents.append(present)
        logits = self.lm_head(self.ln_f(x))

        loss = None
        if labels is not None:
            shift_logits = logits[:, :-1, :].reshape(-1, logits.size(-1))
            shift_labels = labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(shift_logits, shift_labels, ignore_index=-100)
        return {"loss": loss, "logits": logits, "past_key_values": presents if use_cache else None}

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, attention_mask=None, do_sample=False, temperature=1.0, top_k=None,
        repetition_penalty=1.0, eos_token_id=None, pad_token_id=0, use_cache=True,
    ):
        if input_ids.size(1) + max_new_tokens > self.n_positions:
            raise ValueError(f"{input_ids.size(1)} + {max_new_tokens} tokens are more than {self.n_positions}")
        was_training = self.training
        self.eval()
        rows, n_prompt = input_ids.shape
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        last = n_prompt - 1 - real.flip(1).argmax(1)  # of each row, wherever its padding stands
        ids, past = input_ids, None
        done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        for step in range(max_new_tokens):
            fresh = ids if past is None else ids[:, -1:]
            out = self(fresh, layer_past=past, attention_mask=real, use_cache=use_cache)
            if use_cache:
                past = out["past_key_values"]
            if step == 0:
                logits = out["logits"][torch.arange(rows, device=ids.device), last]
            else:
                logits = out["logits"][:, -1]
            if repetition_penalty != 1.0:
                seen = logits.gather(1, ids)
                seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
                logits = logits.scatter(1, ids, seen)
            if do_sample:
                logits = logits / temperature
                if top_k is not None:
                    limit = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < limit, float("-inf"))
                token = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
            else:
                token = logits.argmax(-1)
            if eos_token_id is not None:
                token = torch.where(done, torch.full_like(token, pad_token_id), token)
                done = done | (token == eos_token_id)
            ids = torch.cat((ids, token[:, None]), dim=1)
            real = torch.cat((real, torch.ones_like(token)[:, None]), dim=1)
            if eos_token_id is not None and done.all():
                break
        self.train(was_training)
        return ids
