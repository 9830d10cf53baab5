"""A second list of such bugs, in six other models, each with the class that a reader of the catalogue gives it.

Written on 2026-11-30, from memory of public issues, ports, refactorings and tutorials, by somebody who had read the
catalogue and none of the checks, experiments, symptoms, planted bugs and the first list. No model here promises anything
or has a reference, as in a stranger's file. The list was fixed and committed before anything was measured with it.
"""

from __future__ import annotations

from benchmarks.unseen.bugs import bugs_in

_GPTJ = bugs_in(
    "gptj_like",
    (
        "position-restarts-in-decode",
        "clamp(min=0)[:, past_length:]",
        "clamp(min=0)[:, :seq_length]",
    ),
    (
        "padding-mask-ignored",
        "out = self(step_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)",
        "out = self(step_ids, past_key_values=past, use_cache=True)",
    ),
    (
        "chunk-mask-top-left",
        "bias[None, None, past_length:total, :total]",
        "bias[None, None, :seq_length, :total]",
    ),
    (
        "position-ids-ignored",
        "if position_ids is None:",
        "if position_ids is None or past_key_values is not None:",
    ),
    (
        "labels-flattened-before-shift",
        """\
            shift_logits = logits[:, :-1, :].float()
            shift_labels = labels[:, 1:]
""",
        """\
            shift_logits = logits.reshape(-1, logits.size(-1))[:-1].float()
            shift_labels = labels.reshape(-1)[1:]
""",
    ),
    (
        "ignore-index-not-honoured",
        "ignore_index=-100",
        "ignore_index=self.config.pad_token_id",
    ),
    (
        "no-positions",
        "key = self._rotate(self._split_heads(self.k_proj(hidden_states)), position_ids).permute(0, 2, 1, 3)",
        "key = self._split_heads(self.k_proj(hidden_states)).permute(0, 2, 1, 3)",
    ),
    (
        "rope-pairing-convention",
        "return torch.stack((-x2, x1), dim=-1).flatten(-2)",
        "return torch.cat((-x2, x1), dim=-1)",
    ),
    (
        "masked-row-nan",
        "masked_fill(~bias, torch.finfo(attn_weights.dtype).min)",
        'masked_fill(~bias, float("-inf"))',
    ),
    (
        "softmax-wrong-axis",
        "self.attn_dropout(F.softmax(attn_weights, dim=-1))",
        "self.attn_dropout(F.softmax(attn_weights, dim=1))",
    ),
    (
        "gradient-detached",
        "feed_forward = self.mlp(hidden_states)",
        "feed_forward = self.mlp(hidden_states.detach())",
    ),
    (
        "dropout-rescaled-in-eval",
        "return residual + self.resid_dropout(attn_output + feed_forward), present",
        """\
update = self.resid_dropout(attn_output + feed_forward)
        if not self.training:
            update = update * (1.0 - self.resid_dropout.p)
        return residual + update, present""",
    ),
    (
        "recompute-redraws-dropout",
        "use_reentrant=False",
        "use_reentrant=False, preserve_rng_state=False",
    ),
    (
        "resized-head-reinitialised",
        "            lm_head.weight[:n] = self.lm_head.weight[:n]\n",
        "",
    ),
    (
        "beam-reorder-skipped",
        "tuple(t.index_select(0, beam_idx) for t in layer_past)",
        "(layer_past[0].index_select(0, beam_idx), layer_past[1])",
    ),
    (
        "eos-not-per-row",
        "if eos_token_id is not None and finished.all():",
        "if eos_token_id is not None and finished.any():",
    ),
    (
        "repetition-penalty-wrong",
        "seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)",
        "seen = seen / repetition_penalty",
    ),
    (
        "top-k-edge",
        "torch.topk(logits, min(top_k, logits.size(-1)))[0][:, -1:]",
        "torch.topk(logits, top_k)[0][:, -1:]",
    ),
)

_LATENT = bugs_in(
    "latent_moe",
    (
        "cached-path-diverges",
        """\
            probs = (scores * self.scale).softmax(dim=-1)
            out = torch.einsum("bhts,bsr->bthr", probs, latent)
""",
        """\
            probs = (scores * self.nope**-0.5).softmax(dim=-1)
            out = torch.einsum("bhts,bsr->bthr", probs, latent)
""",
    ),
    (
        "module-never-called",
        "new = torch.cat([self.kv_norm(latent), k_pe], dim=-1)",
        "new = torch.cat([latent, k_pe], dim=-1)",
    ),
    (
        "cached-keys-rotated-again",
        "        S = cache.shape[1]\n",
        """\
        S = cache.shape[1]
        if past is not None:
            k_pe = rope(k_pe.unsqueeze(2), torch.arange(S, device=x.device), self.theta).squeeze(2)
""",
    ),
    (
        "chunk-unmasked",
        '.masked_fill(future, float("-inf")).softmax(dim=-1)',
        '.masked_fill(future if past is None else torch.zeros_like(future), float("-inf")).softmax(dim=-1)',
    ),
    (
        "rope-low-precision",
        "angle = pos.to(torch.float64)[:, None] * freq",
        "angle = pos.to(x.dtype)[:, None] * freq.to(x.dtype)",
    ),
    (
        "cache-list-mutated",
        "            new_cache.append(layer_cache)\n",
        """\
            new_cache.append(layer_cache)
            if cache is not None:
                cache[i] = layer_cache
""",
    ),
    (
        "expert-capacity-drops-tokens",
        "token, slot = torch.where(chosen == i)",
        """\
token, slot = torch.where(chosen == i)
            capacity = -(-5 * chosen.numel() // (4 * self.n_experts))
            token, slot = token[:capacity], slot[:capacity]""",
    ),
    (
        "gradient-detached",
        "expert(x[token]) * weights[token, slot, None]",
        "expert(x[token]) * weights[token, slot, None].detach()",
    ),
    (
        "parameters-unregistered",
        "nn.ModuleList([MLP(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts)])",
        "[MLP(args.dim, args.moe_inter_dim) for _ in range(args.n_routed_experts)]",
    ),
    (
        "norm-of-zeros-nan",
        "torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)",
        "torch.rsqrt(y.pow(2).mean(-1, keepdim=True))",
    ),
    (
        "ignore-index-not-honoured",
        "return (nll * keep).sum()",
        "return nll.sum()",
    ),
    (
        "labels-not-shifted",
        "logits, labels = logits[:, :-1], labels[:, 1:]",
        "logits, labels = logits[:, :-1], labels[:, :-1]",
    ),
    (
        "all-ignored-loss-nan",
        "keep.sum().clamp(min=1)",
        "keep.sum()",
    ),
    (
        "sampled-from-wrong-distribution",
        "return order.gather(-1, drawn)",
        "return drawn",
    ),
    (
        "generation-overflow",
        "if start + tokens.shape[1] > self.args.max_seq_len:",
        "if tokens.shape[1] > self.args.max_seq_len:",
    ),
    (
        "generator-reseeded",
        "inp = self.pick(logits, temperature, top_p, rng)",
        "inp = self.pick(logits, temperature, top_p, rng if seed is None else rng.manual_seed(seed))",
    ),
    (
        "global-random-state-changed",
        "rng = torch.Generator(device=tokens.device).manual_seed(seed)",
        "rng = torch.manual_seed(seed)",
    ),
)

_GEMMA = bugs_in(
    "gemma_like",
    (
        "mask-value-too-small",
        """\
        scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
""",
        """\
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        scores = self.softcap * torch.tanh(scores / self.softcap)
""",
    ),
    (
        "window-ignored-in-decode",
        """\
        if self.window is not None:
            allowed""",
        """\
        if self.window is not None and T > 1:
            allowed""",
    ),
    (
        "ring-cache-overwritten",
        """\
        return k, v

    def reorder_cache""",
        """\
        return self.keys[layer_idx], self.values[layer_idx]

    def reorder_cache""",
    ),
    (
        "position-from-kept-length",
        "torch.arange(seen, seen + T, device=input_ids.device)[None]",
        """\
torch.arange(T, device=input_ids.device)[None]
                if seen:
                    position_ids = position_ids + past_key_values.keys[0].shape[2]""",
    ),
    (
        "layer-kinds-mixed-up",
        "[config.sliding_window if is_sliding(i) else None for i in range(config.num_hidden_layers)]",
        "[config.sliding_window if is_sliding(i + 1) else None for i in range(config.num_hidden_layers)]",
    ),
    (
        "tie-lost",
        "self.lm_head.weight = self.embed_tokens.weight",
        "self.lm_head.weight.data = self.embed_tokens.weight.data",
    ),
    (
        "cache-object-replaced",
        "        seen = past_key_values.seen if past_key_values is not None else 0\n",
        """\
        if past_key_values is not None:
            given, past_key_values = past_key_values, self.make_cache()
            past_key_values.keys, past_key_values.values = list(given.keys), list(given.values)
            past_key_values.seen = given.seen
        seen = past_key_values.seen if past_key_values is not None else 0
""",
    ),
    (
        "state-survives-calls",
        "return GemmaCache(self.config)",
        """\
if not hasattr(self, "_cache"):
            self._cache = GemmaCache(self.config)
        return self._cache""",
    ),
    (
        "module-never-called",
        "q = self.q_norm(self.q_proj(x).view(B, T, self.num_heads, self.head_dim)).transpose(1, 2)",
        "q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)",
    ),
    (
        "heads-mixed-by-reshape",
        "v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)",
        "v = self.v_proj(x).view(B, self.num_kv_heads, T, self.head_dim)",
    ),
    (
        "softmax-overflow-half",
        "scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)",
        "scores.masked_fill(~allowed, -1e9)",
    ),
    (
        "rmsnorm-overflow-half",
        "y = x.float()",
        "y = x",
    ),
    (
        "padding-mask-lost-in-decode",
        "padding_mask[:, None, None, total - S :]",
        "padding_mask[:, None, None, :S]",
    ),
    (
        "padded-batch-shared-position",
        "if attention_mask is None:\n                position_ids",
        "if attention_mask is None or seen > 0:\n                position_ids",
    ),
    (
        "labels-change-logits",
        "        logits = cap * torch.tanh(logits / cap)\n",
        """\
        if labels is None:
            logits = cap * torch.tanh(logits / cap)
""",
    ),
    (
        "inputs-written-in-place",
        "            targets = labels[:, 1:].reshape(-1)\n",
        """\
            if attention_mask is not None:
                labels[attention_mask == 0] = -100
            targets = labels[:, 1:].reshape(-1)
""",
    ),
    (
        "loss-wrong-denominator",
        "loss = nll / (targets != -100).sum().clamp(min=1)",
        "loss = nll / targets.numel()",
    ),
    (
        "temperature-misapplied",
        "logits = logits / temperature",
        "logits = logits * temperature",
    ),
)

_LEARNER = bugs_in(
    "learner_chars",
    (
        "bidirectional-mask",
        "mask = self.mask[:T, :T]",
        "mask = self.mask[:T, :T].to(x.dtype)",
    ),
    (
        "mask-sees-next-token",
        "diagonal=1)",
        "diagonal=2)",
    ),
    (
        "mask-dropped-on-fast-path",
        "mask = self.mask[:T, :T]",
        "mask = self.mask[:T, :T] if targets is not None else None",
    ),
    (
        "no-positions",
        "x = x + self.pe[: x.size(1)].to(x.dtype)",
        "x = x + self.pe[: x.size(0)].unsqueeze(1).to(x.dtype)",
    ),
    (
        "tensor-left-behind",
        'self.register_buffer("mask", torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), diagonal=1))',
        "self.mask = torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), diagonal=1)",
    ),
    (
        "block-shared",
        "nn.ModuleList([DecoderBlock(d_model, n_heads, dropout) for _ in range(n_layers)])",
        "nn.ModuleList([DecoderBlock(d_model, n_heads, dropout)] * n_layers)",
    ),
    (
        "module-never-called",
        "        x = self.ln_f(x)\n",
        "",
    ),
    (
        "dropout-inverted",
        "self.dropout = nn.Dropout(p=dropout)",
        "self.dropout = nn.Dropout(p=1.0 - dropout)",
    ),
    (
        "labels-shifted-twice",
        "F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)",
        "F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1)",
    ),
    (
        "optimizer-forgets-parameters",
        "no_decay = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]",
        'no_decay = [p for n, p in self.named_parameters() if p.requires_grad and n.endswith("bias")]',
    ),
    (
        "mode-not-restored",
        "        self.train(was_training)\n",
        "",
    ),
    (
        "temperature-zero",
        "if temperature == 0.0:",
        "if top_k == 1:",
    ),
    (
        "top-k-edge",
        "v[:, [-1]]",
        "v[:, -1]",
    ),
    (
        "top-p-edge",
        "    remove[:, 1:] = remove[:, :-1].clone()  # keep the one that crosses the border\n    remove[:, 0] = False\n",
        "",
    ),
    (
        "sampled-from-wrong-distribution",
        "probs = F.softmax(logits, dim=-1)",
        "probs = F.softmax(logits, dim=0)",
    ),
    (
        "context-crop-wrong",
        "idx_cond = idx[:, -self.block_size :]",
        "idx_cond = idx[:, : self.block_size]",
    ),
    (
        "prompt-not-kept",
        "idx = torch.cat((idx, idx_next), dim=1)",
        "idx = torch.cat((idx_cond, idx_next), dim=1)",
    ),
    (
        "generated-length-wrong",
        "for _ in range(max_new_tokens):",
        "for _ in range(idx.size(1), max_new_tokens):",
    ),
)

_HYBRID = bugs_in(
    "recurrent_hybrid",
    (
        "carried-state-lost",
        "if carried is None:",
        "if carried is None or x.size(1) > 1:",
    ),
    (
        "carried-state-lost",
        """\
        if h is not None:
            y = y + total.exp() * h[:, None]
""",
        "",
    ),
    (
        "convolution-not-causal",
        "self.bias, groups=x.size(2)).transpose(1, 2)",
        "self.bias, padding=1, groups=x.size(2)).transpose(1, 2)[:, 2:]",
    ),
    (
        "alibi-lost-in-decode",
        "-self.slopes * distance.abs()",
        "-self.slopes * distance[:, -T:].abs()",
    ),
    (
        "recurrence-grows",
        """\
        log_a = -self.C * F.softplus(self.rate) * torch.sigmoid(self.decay_gate(x))  # (B, T, W), below 0
        u = torch.sqrt(-torch.expm1(2 * log_a)) * torch.sigmoid(self.input_gate(x)) * x
""",
        """\
        log_a = self.C * F.softplus(self.rate) * torch.sigmoid(self.decay_gate(x))  # (B, T, W)
        u = torch.sigmoid(self.input_gate(x)) * x
""",
    ),
    (
        "decay-powers-overflow",
        """\
        decay = total[:, :, None] - total[:, None, :]  # (B, T, S, W), from s to t
        later = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        decay = decay.masked_fill(later[None, :, :, None], float("-inf")).exp()
        y = torch.einsum("btsw,bsw->btw", decay, u)
""",
        """\
        y = total.exp() * (u * (-total).exp()).cumsum(dim=1)
""",
    ),
    (
        "exp-before-mask",
        'decay = decay.masked_fill(later[None, :, :, None], float("-inf")).exp()',
        "decay = decay.exp().masked_fill(later[None, :, :, None], 0.0)",
    ),
    (
        "cache-mutated-in-place",
        "u = u + log_a.exp() * h[:, None]",
        "u = h.mul_(log_a[:, 0].exp()).add_(u[:, 0])[:, None]",
    ),
    (
        "cached-path-diverges",
        "u = u + log_a.exp() * h[:, None]",
        "u = (1 - log_a.exp()) * u + log_a.exp() * h[:, None]",
    ),
    (
        "cache-rows-shared",
        "k[:, None].expand(B, self.n_heads, S, self.head_dim)",
        "k[0].expand(B, self.n_heads, S, self.head_dim)",
    ),
    (
        "heads-mixed-by-reshape",
        "self.o_proj(y.transpose(1, 2).reshape(B, T, C))",
        "self.o_proj(y.reshape(B, T, C))",
    ),
    (
        "dropout-active-in-eval",
        "dropout_p=self.dropout if self.training else 0.0",
        "dropout_p=self.dropout",
    ),
    (
        "gradient-wrong",
        "u = torch.sqrt(-torch.expm1(2 * log_a)) *",
        "u = torch.sqrt(-torch.expm1(2 * log_a)).detach() *",
    ),
    (
        "init-scale-wrong",
        "        nn.init.normal_(self.embedding.weight, std=0.02)\n",
        "",
    ),
    (
        "loss-wrong-denominator",
        "losses.sum() / counted.sum().clamp(min=1)",
        "(losses.sum(1) / counted.sum(1).clamp(min=1)).mean()",
    ),
    (
        "eos-not-per-row",
        "ended = ended | (token == eos_id)",
        "ended = ended ^ (token == eos_id)",
    ),
    (
        "seed-ignored",
        "torch.Generator(prompt.device).manual_seed(seed)",
        "torch.Generator(prompt.device).manual_seed(0)",
    ),
    (
        "mode-not-restored",
        """\
        for m, mode in modes:
            m.training = mode
""",
        "        self.train(modes[0][1])\n",
    ),
)

_LLAMA = bugs_in(
    "llama2c_like",
    (
        "chunk-mask-top-left",
        """\
            if T > 1 and start_pos > 0:
                q_pos = torch.arange(start_pos, start_pos + T, device=x.device)
                mask = torch.arange(start_pos + T, device=x.device)[None, :] <= q_pos[:, None]
""",
        "",
    ),
    (
        "position-restarts-in-decode",
        "pos += cur.size(1)",
        "pos = cur.size(1)",
    ),
    (
        "state-survives-calls",
        "    model.remove_caches()\n",
        "",
    ),
    (
        "cache-keeps-graph",
        "self.k[:B, :, start_pos : start_pos + T] = k.detach()",
        "self.k[:B, :, start_pos : start_pos + T] = k",
    ),
    (
        "gqa-head-order",
        "k = k.repeat_interleave(self.n_rep, dim=1)",
        "k = k.repeat(1, self.n_rep, 1, 1)",
    ),
    (
        "complex-table-cast",
        "        self._make_freqs()  # a complex table does not survive .to(torch.bfloat16)\n",
        "",
    ),
    (
        "buffers-uninitialised",
        "        self._make_freqs()  # a complex table does not survive .to(torch.bfloat16)\n",
        """\
        if not self.freqs_cis.is_complex():  # a complex table does not survive .to(torch.bfloat16)
            self._make_freqs()
""",
    ),
    (
        "lenient-load",
        '        if prefix + "wq.weight" in state_dict:\n',
        """\
        state_dict.setdefault(prefix + "wqkv.weight", self.wqkv.weight)
        if prefix + "wq.weight" in state_dict:
""",
    ),
    (
        "mask-dropped-with-dropout",
        """\
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=T > 1 and mask is None,
        )
""",
        """\
        if self.training and self.dropout > 0:
            att = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), dim=-1)
            y = F.dropout(att, self.dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1 and mask is None)
""",
    ),
    (
        "contiguous-input-assumed",
        "targets.reshape(-1)",
        "targets.view(-1)",
    ),
    (
        "loss-low-precision",
        "logits.float().view(-1, logits.size(-1))",
        "logits.view(-1, logits.size(-1))",
    ),
    (
        "copy-uses-original",
        """\
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, freqs_cis, start_pos):
        h = x + self.attention(self.attention_norm(x), freqs_cis, start_pos)
        return h + self.feed_forward(self.ffn_norm(h))
""",
        """\
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn = lambda h: self.feed_forward(self.ffn_norm(h))

    def forward(self, x, freqs_cis, start_pos):
        h = x + self.attention(self.attention_norm(x), freqs_cis, start_pos)
        return h + self.ffn(h)
""",
    ),
    (
        "position-table-clamped",
        """\
        if start_pos + T > self.args.max_seq_len:
            raise ValueError(f"max_seq_len is {self.args.max_seq_len}")
        h = self.dropout(self.tok_embeddings(tokens))
        freqs_cis = self.freqs_cis[start_pos : start_pos + T]
""",
        """\
        h = self.dropout(self.tok_embeddings(tokens))
        pos = torch.arange(start_pos, start_pos + T, device=tokens.device)
        freqs_cis = self.freqs_cis[pos.clamp(max=self.args.max_seq_len - 1)]
""",
    ),
    (
        "gradient-cleared-in-forward",
        "        loss = F.cross_entropy(",
        """\
        if torch.is_grad_enabled():
            self.zero_grad(set_to_none=True)
        loss = F.cross_entropy(""",
    ),
    (
        "statistic-over-sequence",
        "x.pow(2).mean(-1, keepdim=True)",
        "x.pow(2).mean((-2, -1), keepdim=True)",
    ),
    (
        "init-scale-wrong",
        'name.endswith(("w2.weight", "wo.weight"))',
        'name.endswith(("w3.weight", "wo.weight"))',
    ),
    (
        "top-k-edge",
        "logits < v[:, -1:]",
        "logits <= v[:, -1:]",
    ),
)

SECOND_BUGS = [*_GPTJ, *_LATENT, *_GEMMA, *_LEARNER, *_HYBRID, *_LLAMA]
