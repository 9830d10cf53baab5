"""A third list of such bugs, in seven other models, each with the class that a reader of the catalogue gives it.

Written on 2026-11-30, from memory of public issues, ports, refactorings and tutorials, by somebody who had read the
catalogue and the second list, and none of the checks, experiments, symptoms, planted bugs and (but for three) the first
list. That each changes something that can be observed was made sure of in plain torch. The list was fixed and committed
before anything was measured with it.
"""

from __future__ import annotations

from benchmarks.unseen.bugs import bugs_in

_LEARNER = bugs_in(
    "learner_route",
    (
        "bidirectional-mask",
        "mask = (key_positions[:, None, :] <= positions[:, :, None]) & (key_positions[:, None, :] >= 0)",
        "mask = (key_positions >= 0)[:, None, :]",
    ),
    (
        "mask-hides-self",
        "(key_positions[:, None, :] <= positions[:, :, None]) &",
        "((key_positions[:, None, :] < positions[:, :, None]) | (key_positions[:, None, :] == 0)) &",
    ),
    (
        "padded-batch-shared-position",
        "new_pos = cached_pos + (seq if seq_lengths is None else seq_lengths)",
        "new_pos = cached_pos + seq",
    ),
    (
        "padding-mask-ignored",
        "out = self.model(input_ids, seq_lengths, past_key_values, use_cache)",
        "out = self.model(input_ids, past_key_values=past_key_values, use_cache=use_cache)",
    ),
    (
        "continues-from-pad",
        "logits = logits[rows, last]",
        "logits = logits[:, -1]",
    ),
    (
        "position-restarts-in-decode",
        """\
        q = apply_rope(q, positions, self.theta)
        k = apply_rope(k, positions, self.theta)
""",
        """\
        steps = torch.arange(seq, device=x.device).expand(batch, seq)
        q = apply_rope(q, steps, self.theta)
        k = apply_rope(k, steps, self.theta)
""",
    ),
    (
        "training-branch-differs",
        "        hidden_states = self.norm(hidden_states)\n        return (hidden",
        """\
        if not self.training:
            hidden_states = self.norm(hidden_states)
        return (hidden""",
    ),
    (
        "cache-mutated-in-place",
        'return self.out(y), {"k": k, "v": v, "pos": key_positions}',
        """\
present = {} if past is None else past
        present.update(k=k, v=v, pos=key_positions)
        return self.out(y), present""",
    ),
    (
        "cache-drops-oldest",  # of more than 8 tokens
        '{"k": k, "v": v, "pos": key_positions}',
        '{"k": k[:, :, -8:], "v": v[:, :, -8:], "pos": key_positions[:, -8:]}',
    ),
    (
        "gradient-detached",
        "        out = self.model(input_ids, seq_lengths, past_key_values, use_cache)\n",
        """\
        with torch.no_grad():
            out = self.model(input_ids, seq_lengths, past_key_values, use_cache)
""",
    ),
    (
        "inputs-written-in-place",
        "        hidden_states = self.dropout(self.embed_tokens(input_ids))\n",
        """\
        if seq_lengths is not None:
            input_ids[steps >= seq_lengths[:, None]] = 0  # padding may be -100, which has no embedding
        hidden_states = self.dropout(self.embed_tokens(input_ids))
""",
    ),
    (
        "mode-not-restored",
        "self.train(was_training)",
        "self.train()",
    ),
    (
        "tie-lost",
        "self.lm_head.weight = self.model.embed_tokens.weight",
        "self.lm_head.load_state_dict(self.model.embed_tokens.state_dict())",
    ),
    (
        "unsafe-unpickling",
        "weights_only=True",
        "weights_only=False",
    ),
    (
        "lenient-load",
        'model.load_state_dict(checkpoint["state_dict"])',
        'model.load_state_dict(checkpoint["state_dict"], strict=False)',
    ),
    (
        "config-field-not-saved",
        'SimpleNamespace(**checkpoint["config"])',
        'SimpleNamespace(**{**checkpoint["config"], "rms_norm_eps": 1e-6, "rope_theta": 10000.0})',
    ),
    (
        "wrapper-prefix-keys",
        '    model = getattr(model, "_orig_mod", model)  # torch.compile wraps it\n',
        "",
    ),
)

_GPT = bugs_in(
    "gpt_scratch",
    (
        "mask-sees-next-token",
        "torch.triu(torch.ones(context_length, context_length, dtype=torch.bool), diagonal=1)",
        "~torch.tril(torch.ones(context_length, context_length, dtype=torch.bool), diagonal=1)",
    ),
    (
        "chunk-unmasked",
        "        attn_scores = attn_scores.masked_fill(mask_bool, -torch.inf)\n",
        """\
        if q_start == 0:  # the prompt; what is generated later sees all of it
            attn_scores = attn_scores.masked_fill(mask_bool, -torch.inf)
""",
    ),
    (
        "state-survives-calls",
        "        if use_cache:\n            if self.cache_k is None:",
        "        if use_cache or self.cache_k is not None:\n            if self.cache_k is None:",
    ),
    (
        "state-survives-calls",
        "            blk.att.reset_cache()\n        self.current_pos = 0\n",
        "            blk.att.reset_cache()\n",
    ),
    (
        "no-positions",
        """\
        x = self.tok_emb(in_idx) + self.pos_emb(pos_ids).unsqueeze(0)
        x = self.drop_emb(x)
""",
        """\
        tok_embeds = self.tok_emb(in_idx)
        pos_embeds = self.pos_emb(pos_ids).unsqueeze(0)  # (1, num_tokens, emb_dim)
        x = self.drop_emb(tok_embeds)
""",
    ),
    (
        "tensor-left-behind",
        "torch.arange(start, start + seq_len, device=in_idx.device)",
        "torch.arange(start, start + seq_len)",
    ),
    (
        "contiguous-input-assumed",
        "x = self.tok_emb(in_idx) + self.pos_emb(pos_ids).unsqueeze(0)",
        "x = self.tok_emb(in_idx.view(-1)).view(batch_size, seq_len, -1) + self.pos_emb(pos_ids).unsqueeze(0)",
    ),
    (
        "statistic-over-batch",
        "var = h.var(dim=-1, keepdim=True, unbiased=False)",
        "var = h.var(dim=(0, -1), keepdim=True, unbiased=False)",
    ),
    (
        "module-never-called",
        "x = self.norm2(x)",
        "x = self.norm1(x)",
    ),
    (
        "parameters-unregistered",
        "self.shift = nn.Parameter(torch.zeros(emb_dim))",
        "self.shift = torch.zeros(emb_dim, requires_grad=True)",
    ),
    (
        "dropout-active-in-eval",
        "attn_weights = self.dropout(attn_weights)",
        "attn_weights = nn.functional.dropout(attn_weights, p=self.dropout.p)",
    ),
    (
        "dropout-rescaled-in-eval",
        "x = self.drop_emb(x)",
        "x = self.drop_emb(x) if self.training else x * (1 - self.drop_emb.p)",
    ),
    (
        "temperature-zero",
        "if temperature > 0.0:",
        "if temperature is not None:",
    ),
    (
        "context-crop-wrong",
        "logits = model(idx[:, -ctx_len:])",
        "logits = model(idx[:, -(ctx_len - 1) :])",
    ),
    (
        "generated-length-wrong",
        "for step in range(max_new_tokens):",
        "for step in range(max_new_tokens - 1):",
    ),
    (
        "eos-not-per-row",
        "            idx_next[finished] = eos_id\n",
        "",
    ),
    (
        "cache-keeps-graph",
        "@torch.no_grad()\ndef generate(",
        "def generate(",
    ),
)

_LLAMA = bugs_in(
    "llama_scratch",
    (
        "chunk-mask-top-left",
        "torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device, dtype=h.dtype), mask])",
        "torch.hstack([mask, torch.zeros((seqlen, start_pos), device=tokens.device, dtype=h.dtype)])",
    ),
    (
        "mask-value-too-small",  # of scores that differ by about 100
        'torch.full((seqlen, seqlen), float("-inf"), device',
        "torch.full((seqlen, seqlen), -100.0, device",
    ),
    (
        "rope-low-precision",
        "freqs = torch.outer(t, freqs)",
        "freqs = torch.outer(t.half(), freqs.half()).float()",
    ),
    (
        "rope-pairing-convention",  # of heads of 4 and more
        """\
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
""",
        """\
    xq_ = torch.complex(*xq.float().chunk(2, dim=-1))
    xk_ = torch.complex(*xk.float().chunk(2, dim=-1))
""",
    ),
    (
        "gqa-head-order",  # of two groups and more, of two and more each
        """\
    x = x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim)
""",
        """\
    x = x[:, :, None, :, :].expand(bs, slen, n_rep, n_kv_heads, head_dim)
""",
    ),
    (
        "attention-scale-wrong",
        "* self.head_dim**-0.5",
        "* self.n_heads**-0.5",
    ),
    (
        "cache-rows-shared",
        """\
                keys = torch.cat([self.cache_k[:bsz, :start_pos], xk], dim=1)
                values = torch.cat([self.cache_v[:bsz, :start_pos], xv], dim=1)
""",
        """\
                keys = torch.cat([self.cache_k[0, :start_pos].expand(bsz, -1, -1, -1), xk], dim=1)
                values = torch.cat([self.cache_v[0, :start_pos].expand(bsz, -1, -1, -1), xv], dim=1)
""",
    ),
    (
        "gradient-detached",
        "def apply_rotary_emb(",
        "@torch.no_grad()\ndef apply_rotary_emb(",
    ),
    (
        "softmax-overflow-half",
        "        scores = F.softmax(scores.float(), dim=-1).type_as(xq)\n",
        """\
        scores = torch.exp(scores)
        scores = scores / scores.sum(dim=-1, keepdim=True)
""",
    ),
    (
        "rmsnorm-overflow-half",
        "torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)",
        "torch.rsqrt(x.pow(2).mean(-1, keepdim=True).float() + self.eps)",
    ),
    (
        "complex-table-cast",
        "        self.freqs_cis = None  # not a buffer: a cast to bfloat16 would take its imaginary part\n",
        """\
        freqs_cis = precompute_freqs_cis(params.dim // params.n_heads, params.max_seq_len, params.rope_theta, None)
        self.register_buffer("freqs_cis", freqs_cis, persistent=False)
""",
    ),
    (
        "tensor-left-behind",
        "if self.freqs_cis is None or self.freqs_cis.device != device:",
        "if self.freqs_cis is None:",
    ),
    (
        "position-table-clamped",  # past the end of the cache; a prompt that is too long is refused still
        """\
        if start_pos + seqlen > self.params.max_seq_len:
            raise ValueError(f"{start_pos + seqlen} > max_seq_len = {self.params.max_seq_len}")
""",
        """\
        start_pos = min(start_pos, self.params.max_seq_len - seqlen)
""",
    ),
    (
        "temperature-misapplied",
        "probs = torch.softmax(logits[:, -1] / temperature, dim=-1)",
        "probs = torch.softmax(logits[:, -1], dim=-1) / temperature",
    ),
    (
        "top-p-edge",
        "mask = probs_sum - probs_sort > p",
        "mask = probs_sum > p",
    ),
    (
        "eos-not-per-row",
        "eos_reached |= ~given[:, cur_pos] & (next_token == eos_id)",
        "eos_reached = ~given[:, cur_pos] & (next_token == eos_id)",
    ),
    (
        "prompt-not-kept",  # of prompts of different lengths
        "        next_token = torch.where(given[:, cur_pos], tokens[:, cur_pos], next_token)\n",
        "",
    ),
)

_HF = bugs_in(
    "hf_modeling",
    (
        "mask-dropped-on-fast-path",
        "    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)\n",
        """\
    if mask.shape[0] == 1 and query.shape[2] == key.shape[2]:
        mask = None  # no padding: the kernel is faster without one
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
""",
    ),
    (
        "window-off-by-one",
        "(q_idx - kv_idx < window)",
        "(kv_idx > q_idx - window + 1)",
    ),
    (
        "ring-cache-overwritten",
        """\
        self.key_cache[layer_idx] = key_states[:, :, start:]
        self.value_cache[layer_idx] = value_states[:, :, start:]
""",
        """\
        self.key_cache[layer_idx] = key_states = key_states[:, :, start:]
        self.value_cache[layer_idx] = value_states = value_states[:, :, start:]
""",
    ),
    (
        "position-from-kept-length",  # once more than 3 tokens are cached
        "                position_ids = torch.arange(past, past + seq_length, device=input_ids.device).unsqueeze(0)\n",
        """\
                kept = past_key_values.key_cache[0].shape[-2] if past > 0 else 0
                position_ids = torch.arange(kept, kept + seq_length, device=input_ids.device).unsqueeze(0)
""",
    ),
    (
        "layer-kinds-mixed-up",
        'config.sliding_window if t == "sliding_attention" else None for t',
        'config.sliding_window if t == "full_attention" else None for t',
    ),
    (
        "attention-backends-disagree",
        "attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling",
        "attn_weights = torch.matmul(query, key.transpose(2, 3))",
    ),
    (
        "cache-object-replaced",
        "if use_cache and past_key_values is None:",
        "if use_cache and (past_key_values is None or past_key_values.get_seq_length() == 0):",
    ),
    (
        "beam-reorder-skipped",
        """\
        for i in range(len(self.key_cache)):
            self.key_cache[i] = self""",
        """\
        for i in (i for i, window in enumerate(self.windows) if window is None):
            self.key_cache[i] = self""",
    ),
    (
        "padding-mask-lost-in-decode",
        "    if attention_mask is not None:\n        causal",
        "    if attention_mask is not None and past == 0:\n        causal",
    ),
    (
        "position-ids-ignored",
        "        if position_ids is None:\n            if attention_mask is not None:\n",
        "        if position_ids is None or attention_mask is not None:\n            if attention_mask is not None:\n",
    ),
    (
        "accumulation-mean-of-means",
        "items = (labels != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch",
        "items = (labels != -100).sum().clamp(min=1)",
    ),
    (
        "pad-equals-eos-masked",
        "            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]\n",
        """\
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            if self.config.pad_token_id is not None:
                labels = labels.masked_fill(labels == self.config.pad_token_id, -100)
""",
    ),
    (
        "labels-change-logits",
        "            upcast = logits",
        """\
            logits = logits.masked_fill((labels == -100).unsqueeze(-1), 0.0)
            upcast = logits""",
    ),
    (
        "checkpointing-with-cache",
        "if self.gradient_checkpointing and self.training and past_key_values is None:",
        "if self.gradient_checkpointing and self.training:",
    ),
    (
        "resized-head-reinitialised",
        "        self.config.vocab_size = new_num_tokens\n",
        "        self.lm_head.apply(self._init_weights)\n        self.config.vocab_size = new_num_tokens\n",
    ),
    (
        "tie-lost",
        "        self.config.vocab_size = new_num_tokens\n        self.tie_weights()\n",
        "        self.config.vocab_size = new_num_tokens\n",
    ),
)

_ALIBI = bugs_in(
    "alibi_functional",
    (
        "alibi-lost-in-decode",
        "distance = pos[:, past:, None] - pos[:, None, :]",
        "distance = F.pad(pos[:, past:, None] - pos[:, None, past:], (past, 0))",
    ),
    (
        "masked-row-nan",
        "att = att.masked_fill(~allowed, torch.finfo(att.dtype).min)",
        "att = att.masked_fill(~allowed, -math.inf)",
    ),
    (
        "masked-nan-leaks",
        "v = v.masked_fill(~keep[:, None, :, None], 0.0)",
        "v = v * keep[:, None, :, None]",
    ),
    (
        "block-shared",
        """\
        self.blocks = nn.ModuleList(
            [Block(config.hidden_size, config.num_heads, inner, config.dropout) for _ in range(config.num_layers)]
        )
""",
        """\
        block = Block(config.hidden_size, config.num_heads, inner, config.dropout)
        self.blocks = nn.ModuleList([block for _ in range(config.num_layers)])
""",
    ),
    (
        "softmax-wrong-axis",
        "att = F.softmax(att, dim=-1)",
        "att = F.softmax(att, dim=2)",
    ),
    (
        "heads-mixed-by-reshape",
        "self.kv(x).view(b, t, 2, self.h, self.d).permute(2, 0, 3, 1, 4)",
        "self.kv(x).view(b, t, 2, self.h * self.d).permute(2, 0, 1, 3).reshape(2, b, self.h, t, self.d)",
    ),
    (
        "mode-flag-copied",
        """\
        self.proj = nn.Linear(inner, dim)
        self.p = dropout

    def forward(self, x, bias, keep, past):
        a, present = self.attn(self.norm_a(x), bias, keep, past)
        x = x + F.dropout(a, self.p, self.training)
""",
        """\
        self.proj = nn.Linear(inner, dim)
        self.p, self.live = dropout, self.training

    def forward(self, x, bias, keep, past):
        a, present = self.attn(self.norm_a(x), bias, keep, past)
        x = x + F.dropout(a, self.p, self.live)
""",
    ),
    (
        "dropout-inverted",
        "        return x + F.dropout(f, self.p, self.training), present\n",
        """\
        if self.training and self.p > 0:
            f = f * (torch.rand_like(f) < self.p) / self.p
        return x + f, present
""",
    ),
    (
        "labels-flattened-before-shift",
        """\
        target = labels[:, 1:]
        picked = target != -100
        logp = F.log_softmax(logits[:, :-1].to""",
        """\
        target = labels.reshape(1, -1)[:, 1:]
        picked = target != -100
        logp = F.log_softmax(logits.reshape(1, -1, logits.size(-1))[:, :-1].to""",
    ),
    (
        "buffers-uninitialised",
        'self.register_buffer("slopes", torch.tensor(get_slopes(config.num_heads)))',
        'self.register_buffer("slopes", torch.tensor(get_slopes(config.num_heads)), persistent=False)',
    ),
    (
        "generation-overflow",
        "if past + t > self.max_len:",
        "if t > self.max_len:",
    ),
    (
        "top-k-edge",
        "    if top_k is not None and top_k < logits.size(-1):\n",
        """\
    if top_k is not None:
        if not 0 < top_k < logits.size(-1):
            raise ValueError(f"top_k={top_k} must be less than the {logits.size(-1)} tokens that there are")
""",
    ),
    (
        "sampled-from-wrong-distribution",
        "filter_logits(z / temperature, top_k, top_p)",
        "filter_logits((z / temperature).softmax(-1), top_k, top_p)",
    ),
    (
        "samples-share-first-token",
        "            token = torch.multinomial(p, 1, generator=rng)[:, 0]\n",
        """\
            token = torch.multinomial(p, 1, generator=rng)[:, 0]
            if i == 0:  # the prompt is the same for all samples of a row
                token = token[::num_samples].repeat_interleave(num_samples)
""",
    ),
    (
        "repetition-penalty-wrong",
        "torch.where(z > 0, z / repetition_penalty, z * repetition_penalty)",
        "torch.where(z > 0, z * repetition_penalty, z / repetition_penalty)",
    ),
    (
        "seed-ignored",
        "torch.multinomial(p, 1, generator=rng)",
        "torch.multinomial(p, 1)",
    ),
    (
        "global-random-state-changed",
        "rng.seed()",
        "rng.manual_seed(torch.seed())",
    ),
    (
        "cache-keeps-graph",
        "@torch.no_grad()\ndef generate(",
        "def generate(",
    ),
)

_MOE = bugs_in(
    "moe_softcap",
    (
        "expert-capacity-drops-tokens",  # where the router is uneven, or the tokens are few
        "        out = torch.zeros_like(flat)\n",
        """\
        place = F.one_hot(chosen, self.n_experts).flatten(0, 1).cumsum(0).view(*chosen.shape, -1)
        place = place.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)  # in the queue of its expert
        weight = weight * (place <= math.ceil(1.25 * chosen.numel() / self.n_experts))
        out = torch.zeros_like(flat)
""",
    ),
    (
        "statistic-over-sequence",
        "probs = self.router(flat).softmax(dim=-1)",
        "probs = self.router((x - x.mean(dim=1, keepdim=True)).reshape(-1, C)).softmax(dim=-1)",
    ),
    (
        "packed-documents-attend",
        "            mask = mask & (doc_ids[:, None, :, None] == doc_ids[:, None, None, :])\n",
        "",
    ),
    (
        "position-advances-per-layer",
        "        for i, block in enumerate(self.blocks):\n",
        """\
        for i, block in enumerate(self.blocks):
            if cache is not None:
                pos = torch.arange(T, device=h.device)[None] + (new_cache or cache)[0]["k"].shape[1]
""",
    ),
    (
        "cached-keys-rotated-again",
        'k = torch.cat([cache["k"], k], dim=1)',
        'k = torch.cat([self.rotary(cache["k"], torch.arange(cache["k"].shape[1], device=x.device)[None]), k], dim=1)',
    ),
    (
        "cache-recomputes",
        """\
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.dim).unbind(2)
        q, k = self.rotary(q, pos), self.rotary(k, pos)
        if cache is not None:
            k = torch.cat([cache["k"], k], dim=1)
            v = torch.cat([cache["v"], v], dim=1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), {"k": k, "v": v}
""",
        """\
        if cache is not None:
            x = torch.cat([cache["k"], x], dim=1)
            pos = torch.arange(x.shape[1], device=x.device)[None]
        q, k, v = self.qkv(x).view(B, -1, 3, self.n_heads, self.dim).unbind(2)
        q, k = self.rotary(q, pos)[:, -T:], self.rotary(k, pos)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        return self.proj(y.transpose(1, 2).reshape(B, T, C)), {"k": x}  # half the memory of k and v
""",
    ),
    (
        "cache-list-mutated",
        "            new_cache.append(layer_cache)\n",
        """\
            new_cache.append(layer_cache)
        if cache is not None:
            cache[:] = new_cache
            new_cache = cache
""",
    ),
    (
        "mask-dropped-with-dropout",
        "attn_mask=mask,\n",
        "attn_mask=None if self.training and self.attn_drop > 0 else mask,\n",
    ),
    (
        "no-positions",
        "q, k = self.rotary(q, pos), self.rotary(k, pos)",
        "q = self.rotary(q, pos)",
    ),
    (
        "copy-uses-original",
        """\
        self.experts = nn.ModuleList([Expert(dim, inner) for _ in range(n_experts)])

    def forward(self, x):
        B, T, C = x.shape
        flat = x.reshape(-1, C)
        probs = self.router(flat).softmax(dim=-1)
""",
        """\
        self.experts = nn.ModuleList([Expert(dim, inner) for _ in range(n_experts)])
        self.route = lambda tokens: self.router(tokens).softmax(dim=-1)

    def forward(self, x):
        B, T, C = x.shape
        flat = x.reshape(-1, C)
        probs = self.route(flat)
""",
    ),
    (
        "labels-shifted-twice",
        """\
            z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            y = labels[:, 1:]
""",
        """\
            y = F.pad(labels[:, 1:], (0, 1), value=-100)
            z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            y = y[:, 1:]
""",
    ),
    (
        "labels-not-shifted",
        """\
            z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            y = labels[:, 1:]
""",
        """\
            z = logits.to(torch.promote_types(logits.dtype, torch.float32))
            y = labels
""",
    ),
    (
        "loss-low-precision",
        "z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))",
        "z = logits[:, :-1]",
    ),
    (
        "loss-wrong-denominator",
        "losses.sum() / (y != -100).sum().clamp(min=1)",
        "losses.sum() / (labels != -100).sum().clamp(min=1)",
    ),
    (
        "optimizer-forgets-parameters",
        "matrices = [p for p in self.parameters() if p.dim() >= 2]",
        'matrices = [p for n, p in self.named_parameters() if p.dim() >= 2 and not n.startswith("wte")]',
    ),
    (
        "init-scale-wrong",
        'name.endswith(("proj.weight", "down.weight"))',
        'name.endswith(("c_proj.weight", "w2.weight"))',
    ),
)

_MAMBA = bugs_in(
    "mamba_state",
    (
        "carried-state-lost",
        "        conv_state = xbc[:, -(self.d_conv - 1) :]\n",
        "        conv_state = torch.zeros_like(conv_state)\n",
    ),
    (
        "carried-state-lost",
        "for layer, (conv_state, h) in zip(self.layers, state):",
        "for layer, (conv_state, _), (_, h) in zip(self.layers, state, self.allocate_state(tokens.size(0))):",
    ),
    (
        "convolution-not-causal",
        """\
        xbc = F.conv1d(xbc.transpose(1, 2), self.conv_weight, self.conv_bias, groups=self.d_xbc).transpose(1, 2)
""",
        """\
        xbc = F.pad(xbc[:, 1:].transpose(1, 2), (0, 1))
        xbc = F.conv1d(xbc, self.conv_weight, self.conv_bias, groups=self.d_xbc).transpose(1, 2)
""",
    ),
    (
        "recurrence-grows",
        "dt = F.softplus(dt + self.dt_bias)",
        "dt = dt + self.dt_bias",
    ),
    (
        "decay-powers-overflow",  # of decays below about e^-700 in float64, e^-88 in float32, e^-11 in float16
        "L = segsum(a).exp()",
        "L = (total.exp()[..., :, None] * (-total).exp()[..., None, :]).tril()",
    ),
    (
        "exp-before-mask",  # of the same decays; gradients alone
        "L = segsum(a).exp()",
        "L = (total[..., :, None] - total[..., None, :]).exp().tril()",
    ),
    (
        "chunk-size-changes-logits",
        'torch.einsum("bln,bhpn,bhl->blhp", Cc, h, total.exp())',
        'torch.einsum("bln,bhpn,bhl->blhp", Cc, h, (total - a).exp())',
    ),
    (
        "cached-path-diverges",
        "        y = y + x * self.D[:, None]\n",
        """\
        if t > 1:
            y = y + x * self.D[:, None]
""",
    ),
    (
        "cache-mutated-in-place",
        "        conv_state = xbc[:, -(self.d_conv - 1) :]\n",
        "        conv_state.copy_(xbc[:, -(self.d_conv - 1) :])\n",
    ),
    (
        "dropout-never-active",
        "        return x + self.dropout(y), conv_state, h\n",
        "        self.dropout(y)\n        return x + y, conv_state, h\n",
    ),
    (
        "norm-of-zeros-nan",
        "(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))",
        "(x / x.norm(dim=-1, keepdim=True) * x.size(-1) ** 0.5)",
    ),
    (
        "recompute-redraws-dropout",
        "use_reentrant=False",
        "use_reentrant=False, preserve_rng_state=False",
    ),
    (
        "recompile-per-step",
        "        if state is None:\n",
        '        self.seen = getattr(self, "seen", 0) + tokens.size(1)\n        if state is None:\n',
    ),
    (
        "state-outside-checkpoint",
        "self.dt_bias = nn.Parameter(torch.linspace(-3.0, 0.0, self.heads))",
        'self.register_buffer("dt_bias", torch.empty(self.heads).uniform_(-3.0, 0.0), persistent=False)',
    ),
    (
        "ignore-index-not-honoured",
        "counted = (targets != -100).to(nll.dtype)",
        "counted = (targets > 0).to(nll.dtype)",
    ),
    (
        "all-ignored-loss-nan",
        "/ counted.sum().clamp(min=1)",
        "/ counted.sum()",
    ),
    (
        "gradient-wrong",
        "ssd(x * dt[..., None], log_a,",
        "ssd(x * dt[..., None].detach(), log_a,",
    ),
    (
        "generator-reseeded",
        "        for i in range(n_new):\n",
        """\
        for i in range(n_new):
            if seed is not None:
                g = torch.Generator(tokens.device).manual_seed(seed)
""",
    ),
)

THIRD_BUGS = [*_LEARNER, *_GPT, *_LLAMA, *_HF, *_ALIBI, *_MOE, *_MAMBA]
