"""A fourth list of such bugs, in six other models, each with the class that a reader of the catalogue gives it.

Written on 2026-12-01, from memory of public issues, ports, refactorings and tutorials, by somebody who had read the
catalogue, a few bugs of the first and third lists for their form, and what the harness prints of the correct models (the
titles of the checks, which of them apply, and the report of three failures), and none of the code of checks, experiments
and symptoms, planted bugs and results. That each changes something that can be observed was made sure of in plain torch.
The list was fixed and committed before anything was measured with it.
"""

from __future__ import annotations

from benchmarks.unseen.bugs import bugs_in

_QWEN = bugs_in(
    "learner_qwen",
    (
        "position-restarts-in-decode",
        "positions = torch.arange(start_pos, start_pos + t, device=input_ids.device)",
        "positions = torch.arange(t, device=input_ids.device)",
    ),
    (
        "chunk-unmasked",
        "        scores = scores.masked_fill(col[None, :] > row[:, None], -torch.inf)",
        """\
        if cache is None:
            scores = scores.masked_fill(col[None, :] > row[:, None], -torch.inf)""",
    ),
    (
        "mask-hides-self",
        "scores.masked_fill(col[None, :] > row[:, None], -torch.inf)",
        "scores.masked_fill((col[None, :] >= row[:, None]) & (col[None, :] > 0), -torch.inf)",
    ),
    (
        "cached-keys-rotated-again",
        """\
        keys = rotate(self.k_norm(keys), cos, sin)
        if cache is not None:
            prev_k, prev_v = cache
            keys = torch.cat([prev_k, keys], dim=2)
            values = torch.cat([prev_v, values], dim=2)
""",
        """\
        keys = self.k_norm(keys)
        if cache is not None:
            prev_k, prev_v = cache
            keys = torch.cat([prev_k, keys], dim=2)
            values = torch.cat([prev_v, values], dim=2)
        keys = rotate(keys, cos, sin)
""",
    ),
    (
        "gqa-head-order",
        "queries = queries.reshape(b, self.n_kv, self.n_q // self.n_kv, t, self.head_dim)",
        "queries = queries.reshape(b, self.n_q // self.n_kv, self.n_kv, t, self.head_dim).transpose(1, 2)",
    ),
    (
        "attention-scale-wrong",
        "torch.softmax(scores / self.head_dim**0.5, dim=-1)",
        "torch.softmax(scores, dim=-1)",
    ),
    (
        "rmsnorm-overflow-half",
        "xf = x if x.dtype == torch.float64 else x.float()",
        "xf = x",
    ),
    (
        "rope-low-precision",
        "power = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim",
        "power = torch.arange(0, head_dim, 2, dtype=torch.bfloat16, device=positions.device) / head_dim",
    ),
    (
        "rope-pairing-convention",
        "first, second = x.chunk(2, dim=-1)",
        "first, second = x[..., ::2], x[..., 1::2]",
    ),
    (
        "module-never-called",
        "queries = rotate(self.q_norm(queries), cos, sin)",
        "queries = rotate(queries, cos, sin)",
    ),
    (
        "cache-list-mutated",
        "            next_caches.append(next_cache)\n",
        """\
            next_caches.append(next_cache)
            if kv_caches is not None:
                kv_caches[i] = next_cache
""",
    ),
    (
        "dropout-never-active",
        'nn.Dropout(cfg["drop_rate"])',
        'nn.Dropout(cfg.get("dropout", 0.0))',
    ),
    (
        "top-k-edge",
        "logits.topk(min(top_k, logits.shape[-1])).values",
        "logits.topk(top_k).values",
    ),
    (
        "top-p-edge",
        "keep = sorted_probs.cumsum(dim=-1) - sorted_probs < top_p",
        "keep = sorted_probs.cumsum(dim=-1) < top_p",
    ),
    (
        "eos-not-per-row",
        "if done.all():",
        "if done.any():",
    ),
    (
        "seed-ignored",
        "gen.manual_seed(seed) if seed is not None else gen.seed()",
        "gen.manual_seed(seed) if seed else gen.seed()",
    ),
    (
        "generation-overflow",
        'if start_pos + t > self.cfg["context_length"]:',
        'if t > self.cfg["context_length"]:',
    ),
    (
        "tie-lost",
        "self.out_head.weight = self.tok_emb.weight",
        "self.out_head.weight = nn.Parameter(self.tok_emb.weight.clone())",
    ),
    (
        "config-field-not-saved",
        "model = Qwen3(json.load(f))",
        'model = Qwen3({**json.load(f), "rope_base": 1_000_000.0, "eps": 1e-6})',
    ),
    (
        "lenient-load",
        'torch.load(os.path.join(path, "model.pt"), weights_only=True))',
        'torch.load(os.path.join(path, "model.pt"), weights_only=True), strict=False)',
    ),
    (
        "accumulation-mean-of-means",
        """\
        summed, _ = model.loss(input_ids, labels)
        (summed / n).backward()
""",
        """\
        summed, count = model.loss(input_ids, labels)
        (summed / count.clamp(min=1) / len(micro_batches)).backward()
""",
    ),
)

_LECTURE = bugs_in(
    "lecture_heads",
    (
        "mask-sees-next-token",
        "torch.tril(torch.ones(block_size, block_size, dtype=torch.bool))",
        "torch.tril(torch.ones(block_size, block_size, dtype=torch.bool), diagonal=1)",
    ),
    (
        "mask-dropped-on-fast-path",
        "visible = visible & keep[:, None, :]",
        "visible = keep[:, None, :]",
    ),
    (
        "softmax-wrong-axis",
        "wei = F.softmax(wei, dim=-1)",
        "wei = F.softmax(wei, dim=1)",
    ),
    (
        "attention-scale-wrong",
        "k.shape[-1] ** -0.5",
        "C ** -0.5",
    ),
    (
        "mask-value-too-small",
        "wei = wei.masked_fill(~visible, torch.finfo(wei.dtype).min)",
        "wei = wei - 100.0 * (~visible).to(wei.dtype)",
    ),
    (
        "masked-row-nan",
        "wei.masked_fill(~visible, torch.finfo(wei.dtype).min)",
        'wei.masked_fill(~visible, float("-inf"))',
    ),
    (
        "masked-nan-leaks",
        "            v = v.masked_fill(~keep[:, :, None], 0.0)\n",
        "",
    ),
    (
        "padding-mask-inverted",
        "keep = attention_mask.bool()",
        "keep = attention_mask == 0",
    ),
    (
        "padded-batch-shared-position",
        "            pos = (keep.long().cumsum(1) - 1).clamp(min=0)\n",
        "",
    ),
    (
        "dropout-active-in-eval",
        "wei = self.dropout(wei)",
        "wei = F.dropout(wei, self.dropout.p)",
    ),
    (
        "statistic-over-batch",
        """\
        xmean = xf.mean(-1, keepdim=True)
        xvar = xf.var(-1, keepdim=True, unbiased=False)
""",
        """\
        xmean = xf.mean(0, keepdim=True)
        xvar = xf.var(0, keepdim=True, unbiased=False)
""",
    ),
    (
        "norm-of-zeros-nan",
        "torch.sqrt(xvar + self.eps)",
        "(torch.sqrt(xvar) + self.eps)",
    ),
    (
        "parameters-unregistered",
        "self.heads = nn.ModuleList([Head(n_embd, head_size, block_size, dropout) for _ in range(n_head)])",
        "self.heads = [Head(n_embd, head_size, block_size, dropout) for _ in range(n_head)]",
    ),
    (
        "block-shared",
        "nn.ModuleList([Block(n_embd, n_head, self.block_size, config.dropout) for _ in range(self.n_layer)])",
        "nn.Sequential(*[Block(n_embd, n_head, self.block_size, config.dropout)] * self.n_layer)",
    ),
    (
        "init-scale-wrong",
        "self.apply(self._init_weights)",
        "self._init_weights(self)",
    ),
    (
        "ignore-index-not-honoured",
        "counted = targets != -1",
        "counted = targets != -100",
    ),
    (
        "loss-wrong-denominator",
        "torch.where(counted, nll, 0.0).sum() / counted.sum().clamp(min=1)",
        "torch.where(counted, nll, 0.0).mean()",
    ),
    (
        "softmax-without-maximum",
        "logp = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)",
        "logp = F.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).log()",
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
        "repetition-penalty-wrong",
        "torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)",
        "seen / repetition_penalty",
    ),
    (
        "sampled-from-wrong-distribution",
        "probs = F.softmax(logits, dim=-1)",
        "probs = F.softmax(logits, dim=0)",
    ),
    (
        "mode-not-restored",
        "        self.eval()\n        idx = idx.repeat_interleave",
        "        idx = idx.repeat_interleave",
    ),
    (
        "optimizer-forgets-parameters",
        """\
        for p in self.parameters():
            (decay if p.dim() >= 2 else no_decay).append(p)
""",
        """\
        for name, p in self.named_parameters():
            if name.endswith(("weight", "bias")):
                (decay if p.dim() >= 2 else no_decay).append(p)
""",
    ),
)

_RETENTION = bugs_in(
    "retention_state",
    (
        "carried-state-lost",
        "before = torch.cat((last, x[:, :-1]), dim=1)",
        "before = F.pad(x[:, :-1], (0, 0, 1, 0))",
    ),
    (
        "convolution-not-causal",
        "before = torch.cat((last, x[:, :-1]), dim=1)",
        "before = torch.cat((x[:, 1:], last), dim=1)",
    ),
    (
        "position-restarts-in-decode",
        'new = {"seen": state["seen"] + t,',
        'new = {"seen": t,',
    ),
    (
        "cache-mutated-in-place",
        """\
        new = {"seen": state["seen"] + t,""",
        """\
        state["seen"] += t
        new = {"seen": state["seen"],""",
    ),
    (
        "recurrence-grows",
        "torch.log1p(-(2.0 ** -torch.linspace(1.0, 5.0, n_heads)))",
        "torch.log1p(2.0 ** -torch.linspace(1.0, 5.0, n_heads))",
    ),
    (
        "buffers-uninitialised",
        "n_heads))), persistent=True)",
        "n_heads))), persistent=False)",
    ),
    (
        "gradient-wrong",
        "return grad * 2 * r",
        "return grad * r",
    ),
    (
        "dropout-inverted",
        "keep = torch.rand_like(x) >= p",
        "keep = torch.rand_like(x) < p",
    ),
    (
        "dropout-rescaled-in-eval",
        "    if not training or p == 0.0:\n        return x\n",
        "    if not training:\n        return x * (1.0 - p)\n",
    ),
    (
        "statistic-over-sequence",
        "y.square().mean(-1, keepdim=True)",
        "y.square().mean((-2, -1), keepdim=True)",
    ),
    (
        "chunk-size-changes-logits",
        "            inner = (qc",
        """\
            decay = decay / decay.sum(dim=-1, keepdim=True).sqrt()
            inner = (qc""",
    ),
    (
        "beam-reorder-skipped",
        '"last": [m.index_select(0, rows) for m in state["last"]],',
        '"last": state["last"],',
    ),
    (
        "recompute-redraws-dropout",
        "memory, last, use_reentrant=False)",
        "memory, last, use_reentrant=False, preserve_rng_state=False)",
    ),
    (
        "labels-not-shifted",
        """\
            scored = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            target = labels[:, 1:].reshape(-1)
""",
        """\
            scored = logits.to(torch.promote_types(logits.dtype, torch.float32))
            target = labels.reshape(-1)
""",
    ),
    (
        "all-ignored-loss-nan",
        "(target >= 0).sum().clamp(min=1)",
        "(target >= 0).sum()",
    ),
    (
        "samples-share-first-token",
        "                nxt = torch.multinomial(probs, 1, generator=g).squeeze(-1)\n",
        """\
                nxt = torch.multinomial(probs, 1, generator=g).squeeze(-1)
                if step == 0:  # the rows of a prompt have the same logits still
                    nxt = nxt[::n].repeat_interleave(n)
""",
    ),
    (
        "eos-not-per-row",
        "over |= nxt == eos_token_id",
        "over ^= nxt == eos_token_id",
    ),
    (
        "temperature-misapplied",
        """\
                probs = F.softmax(logits.double() / temperature, dim=-1)
                probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
""",
        """\
                probs = F.softmax(logits.double(), dim=-1)
                probs = probs * (probs >= min_p * probs.amax(-1, keepdim=True))
                probs = probs**temperature
""",
    ),
)

_NEOX = bugs_in(
    "neox_parallel",
    (
        "heads-mixed-by-reshape",
        "context = context.transpose(1, 2).reshape(batch, seq,",
        "context = context.reshape(batch, seq,",
    ),
    (
        "no-positions",
        "key = torch.cat((key_rot * cos + rotate_half(key_rot) * sin, key_pass), dim=-1)",
        "key = torch.cat((key_rot, key_pass), dim=-1)",
    ),
    (
        "mask-dropped-with-dropout",
        "            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)\n",
        "",
    ),
    (
        "attention-backends-disagree",
        "scores = torch.matmul(query, key.transpose(-1, -2)) * self.norm_factor",
        "scores = torch.matmul(query, key.transpose(-1, -2)) * self.norm_factor**2",
    ),
    (
        "padding-mask-lost-in-decode",
        "        if attention_mask is not None:\n            allowed = allowed &",
        "        if attention_mask is not None and past_key_values is None:\n            allowed = allowed &",
    ),
    (
        "position-ids-ignored",
        """\
        if position_ids is None:
            position_ids = query_idx.unsqueeze(0)
            if attention_mask is not None:
                position_ids = attention_mask.long().cumsum(-1) - 1
                position_ids = position_ids.clamp(min=0)[:, -seq:]
""",
        """\
        position_ids = query_idx.unsqueeze(0)
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
""",
    ),
    (
        "tensor-left-behind",
        "            angles = position_ids.double().unsqueeze(-1) * self.base**-exponents\n",
        """\
            if not hasattr(self, "inv_freq"):
                self.inv_freq = (self.base**-exponents).to(dtype)
            angles = position_ids.double().unsqueeze(-1) * self.inv_freq
""",
    ),
    (
        "activation-wrong",
        "F.gelu(self.dense_h_to_4h(self.post_attention_layernorm(hidden_states)))",
        'F.gelu(self.dense_h_to_4h(self.post_attention_layernorm(hidden_states)), approximate="tanh")',
    ),
    (
        "labels-shifted-twice",
        """\
            shift_logits = logits[:, :-1, :].to(torch.promote_types(logits.dtype, torch.float32))
            shift_labels = labels[:, 1:]
""",
        """\
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
            shift_logits = logits[:, :-1, :].to(torch.promote_types(logits.dtype, torch.float32))
            shift_labels = labels[:, 1:]
""",
    ),
    (
        "labels-flattened-before-shift",
        """\
            shift_logits = logits[:, :-1, :].to(torch.promote_types(logits.dtype, torch.float32))
            shift_labels = labels[:, 1:]
""",
        """\
            upcast = logits.to(torch.promote_types(logits.dtype, torch.float32))
            shift_logits = upcast.flatten(0, 1)[:-1]
            shift_labels = labels.flatten()[1:]
""",
    ),
    (
        "loss-low-precision",
        "shift_logits = logits[:, :-1, :].to(torch.promote_types(logits.dtype, torch.float32))",
        "shift_logits = logits[:, :-1, :]",
    ),
    (
        "inputs-written-in-place",
        "            shift_labels = labels[:, 1:]\n",
        """\
            if attention_mask is not None:
                labels[attention_mask[:, -seq:] == 0] = -100
            shift_labels = labels[:, 1:]
""",
    ),
    (
        "resized-head-reinitialised",
        "            self.embed_out.weight[:n] = old_out.weight[:n]\n",
        "",
    ),
    (
        "beam-reorder-skipped",
        "past = self._reorder_cache(out.past_key_values, beam_idx)",
        "past = out.past_key_values",
    ),
    (
        "temperature-zero",
        "if do_sample and temperature > 0:",
        "if do_sample:",
    ),
    (
        "top-k-edge",
        "torch.topk(logits, min(top_k, logits.size(-1)))[0][..., -1, None]",
        "torch.topk(logits, min(top_k, logits.size(-1)))[0][0, -1]",
    ),
    (
        "top-p-edge",
        "            remove[..., 0] = False\n",
        "",
    ),
)

_STATIC = bugs_in(
    "multiquery_static",
    (
        "chunk-mask-top-left",
        "mask = torch.arange(end, device=input_ids.device) <= slots[:, None]  # (T, end)",
        "mask = torch.ones(t, end, dtype=torch.bool, device=input_ids.device).tril()",
    ),
    (
        "position-table-clamped",
        """\
        if end > self.cfg.n_ctx:
            raise ValueError(f"{end} tokens, the model has {self.cfg.n_ctx} positions")
        mask = torch.arange(end, device=input_ids.device) <= slots[:, None]  # (T, end)
        positions = slots
""",
        """\
        mask = torch.arange(end, device=input_ids.device) <= slots[:, None]  # (T, end)
        positions = slots.clamp(max=self.cfg.n_ctx - 1)
""",
    ),
    (
        "cache-rows-shared",
        "self.cache_v[:b, input_pos] = v.detach()",
        "self.cache_v[:b, input_pos] = v[0].detach()",
    ),
    (
        "cache-keeps-graph",
        """\
            self.cache_k[:b, input_pos] = k.detach()
            self.cache_v[:b, input_pos] = v.detach()
""",
        """\
            self.cache_k[:b, input_pos] = k
            self.cache_v[:b, input_pos] = v
""",
    ),
    (
        "padding-mask-ignored",
        "        if attention_mask is not None:\n            keep[:, :t] = attention_mask\n",
        "",
    ),
    (
        "dropout-active-in-eval",
        "p = self.attn_dropout if self.training else 0.0",
        "p = self.attn_dropout",
    ),
    (
        "padded-vocabulary-sampled",
        "self.lm_head(self.ln_f(x))[..., : self.cfg.n_vocab]",
        "self.lm_head(self.ln_f(x))",
    ),
    (
        "tie-lost",
        "self.lm_head.weight = self.wte.weight  # tied, always",
        "self.lm_head.weight.data = self.wte.weight.data  # tied, always",
    ),
    (
        "copy-uses-original",
        "        self.lm_head = nn.Linear(cfg.n_embd, cfg.n_padded, bias=False)\n",
        """\
        norm = self.ln_f.forward
        self.ln_f.forward = lambda x: norm(x.contiguous())
        self.lm_head = nn.Linear(cfg.n_embd, cfg.n_padded, bias=False)
""",
    ),
    (
        "gradient-wrong",
        "return grad * grad_output, None",
        "return grad, None",
    ),
    (
        "gradient-cleared-in-forward",
        "        flat = targets.reshape(-1)\n",
        "        self.zero_grad()\n        flat = targets.reshape(-1)\n",
    ),
    (
        "contiguous-input-assumed",
        "flat = targets.reshape(-1)",
        "flat = targets.view(-1)",
    ),
    (
        "softmax-without-maximum",
        "logp = wide - wide.logsumexp(dim=-1, keepdim=True)",
        "logp = wide - wide.exp().sum(dim=-1, keepdim=True).log()",
    ),
    (
        "global-random-state-changed",
        """\
        rng = torch.Generator(device=input_ids.device)
        rng.manual_seed(seed) if seed is not None else rng.seed()
""",
        """\
        rng = None
        if seed is not None:
            torch.manual_seed(seed)
""",
    ),
    (
        "generator-reseeded",
        "token = self._draw(step, temperature, top_p, rng)",
        "token = self._draw(step, temperature, top_p, rng if seed is None else rng.manual_seed(seed))",
    ),
    (
        "temperature-misapplied",
        "probs = torch.softmax(logits.double() / temperature, dim=-1)",
        "probs = torch.softmax(logits.double(), dim=-1) / temperature",
    ),
    (
        "wrapper-prefix-keys",
        '{name.removeprefix("_orig_mod."): w for name, w in model.state_dict().items()}',
        "dict(model.state_dict())",
    ),
    (
        "unsafe-unpickling",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
    ),
)

_GRANITE = bugs_in(
    "granite_sinks",
    (
        "bidirectional-mask",
        "full = (key <= query[:, None])[None, None]",
        "full = (key <= query[-1])[None, None, None]",
    ),
    (
        "window-off-by-one",
        "near = full & (query[:, None] - key < self.window)",
        "near = full & (query[:, None] - key <= self.window)",
    ),
    (
        "ring-cache-overwritten",
        "        return k, v\n",
        "        return self.keys[layer], self.values[layer]\n",
    ),
    (
        "cache-drops-oldest",
        "kept = slice(None) if window is None else",
        "kept = slice(-8, None) if window is None else",
    ),
    (
        "position-from-kept-length",
        "            position_ids = query.expand(b, t)\n",
        """\
            past = cache.keys[0].size(2) if seen else 0
            position_ids = torch.arange(past, past + t, device=input_ids.device).expand(b, t)
""",
    ),
    (
        "cache-object-replaced",
        "        seen = 0 if cache is None else cache.seen\n",
        """\
        cache = None if cache is None else cache.clone()
        seen = 0 if cache is None else cache.seen
""",
    ),
    (
        "state-survives-calls",
        "        return Cache()\n",
        """\
        if not hasattr(self, "_cache"):
            self._cache = Cache()
        return self._cache
""",
    ),
    (
        "cache-argument-swallowed",
        "z = self(step, cache=cache).logits[:, -1]",
        "z = self(step, past_key_values=cache).logits[:, -1]",
    ),
    (
        "packed-documents-attend",
        "            full = full & (document_ids[:, None, :, None] == document_ids[:, None, None, :])\n",
        "",
    ),
    (
        "mask-value-too-small",
        """\
        scores = self.cap * torch.tanh(scores / self.cap)
        scores = scores.masked_fill(~visible[..., -s:], float("-inf"))
""",
        """\
        scores = scores.masked_fill(~visible[..., -s:], float("-inf"))
        scores = self.cap * torch.tanh(scores / self.cap)
""",
    ),
    (
        "router-weights-not-normalised",
        "share = score.softmax(dim=-1)",
        "share = self.router(flat).softmax(dim=-1).gather(1, chosen)",
    ),
    (
        "router-without-gradient",
        "def __init__(self, cfg, n=4, k=2):",
        "def __init__(self, cfg, n=4, k=1):",
    ),
    (
        "gradient-detached",
        "share = score.softmax(dim=-1)",
        "share = score.detach().softmax(dim=-1)",
    ),
    (
        "expert-capacity-drops-tokens",
        "            token, slot = (chosen == e).nonzero(as_tuple=True)\n",
        """\
            token, slot = (chosen == e).nonzero(as_tuple=True)
            room = math.ceil(flat.size(0) * self.k / len(self.experts))
            token, slot = token[:room], slot[:room]
""",
    ),
    (
        "statistic-over-vocabulary",
        "self.embed(input_ids) * self.embedding_multiplier",
        "(self.embed(input_ids) - self.embed.weight.mean(dim=0)) * self.embedding_multiplier",
    ),
    (
        "training-branch-differs",
        "        z = self.unembed(self.norm(x)) / self.logits_scaling\n",
        """\
        z = self.unembed(self.norm(x))
        if not self.training:
            z = z / self.logits_scaling
""",
    ),
    (
        "labels-change-logits",
        "zip(logits[:, :-1], labels[:, 1:])",
        "zip(self.unembed(self.norm(x))[:, :-1], labels[:, 1:])",
    ),
    (
        "loss-wrong-denominator",
        """\
                total = total + (z.logsumexp(-1) - z.gather(1, target[wanted, None])[:, 0]).sum()
                count = count + wanted.sum()
""",
        """\
                nll = z.logsumexp(-1) - z.gather(1, target[wanted, None])[:, 0]
                total = total + nll.sum() / wanted.sum().clamp(min=1)
                count = count + wanted.any()
""",
    ),
    (
        "accumulation-mean-of-means",
        "loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)",
        "loss = total / count.clamp(min=1)",
    ),
    (
        "mode-flag-copied",
        "self.dropout = nn.Dropout(cfg.dropout)",
        "self.dropout = partial(nn.functional.dropout, p=cfg.dropout, training=self.training)",
    ),
    (
        "state-outside-checkpoint",
        "self.sinks = nn.Parameter(torch.zeros(self.heads))",
        'self.register_buffer("sinks", torch.randn(self.heads), persistent=False)',
    ),
    (
        "sampled-from-wrong-distribution",
        'z = torch.full_like(z, float("-inf")).scatter(-1, best.indices, best.values)',
        "z = best.values",
    ),
    (
        "generated-length-wrong",
        "for _ in range(max_new_tokens):",
        "for _ in range(input_ids.size(1), max_new_tokens):",
    ),
)

FOURTH_BUGS = [*_QWEN, *_LECTURE, *_RETENTION, *_NEOX, *_STATIC, *_GRANITE]
