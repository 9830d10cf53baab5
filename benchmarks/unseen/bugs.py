"""One small change a bug, of one place in one of the five files, with the class that a reader of the catalogue gives it.

The list was fixed and committed before anything was measured with it. Changes since, each with its reason:

- contiguous-input-assumed:gpt2_like, `input_ids = input_ids.view(-1, n_new)`, is taken out: a view of a tensor in its own
  shape is right however it lies in memory, so it was no bug.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.unseen import source_of


class UnseenBug(NamedTuple):
    """``old`` stands exactly once in the file."""

    id: str
    slug: str
    file: str
    old: str
    new: str

    @property
    def source(self) -> str:
        """The text of the file with the bug in it."""
        text = source_of(self.file)
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.id}: its place is found {times} times")
        return text.replace(self.old, self.new)


def bugs_in(file: str, *changes: tuple[str, str, str]) -> list[UnseenBug]:
    """Of one file; a class that comes twice there is numbered."""
    found: list[UnseenBug] = []
    for slug, old, new in changes:
        again = sum(bug.slug == slug for bug in found)
        found.append(UnseenBug(f"{slug}:{file}" + (f":{again + 1}" if again else ""), slug, file, old, new))
    return found


_GPT2 = bugs_in(
    "gpt2_like",
    (
        "mask-sees-next-token",
        ".tril(diagonal=n_key - n_query)",
        ".tril(diagonal=n_key - n_query + 1)",
    ),
    (
        "chunk-mask-top-left",
        ".tril(diagonal=n_key - n_query)",
        ".tril()",
    ),
    (
        "mask-value-too-small",
        "scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)",
        "scores = scores + (1.0 - allowed.to(scores.dtype)) * -10000.0",
    ),
    (
        "padding-mask-lost-in-decode",
        "        if attention_mask is not None:\n            allowed",
        "        if attention_mask is not None and layer_past is None:\n            allowed",
    ),
    (
        "padded-batch-shared-position",
        """        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:]
        elif position_ids is None:
""",
        """        if position_ids is None:
""",
    ),
    (
        "position-ids-ignored",
        "if position_ids is None and attention_mask is not None:",
        "if attention_mask is not None:",
    ),
    (
        "cache-list-mutated",
        "            presents.append(present)\n",
        """            presents.append(present)
            if layer_past is not None:
                layer_past[i] = present
""",
    ),
    (
        "cache-drops-oldest",
        """            key = torch.cat((past_key, key), dim=2)
            value = torch.cat((past_value, value), dim=2)
""",
        """            key = torch.cat((past_key, key), dim=2)[:, :, -6:]
            value = torch.cat((past_value, value), dim=2)[:, :, -6:]
""",
    ),
    (
        "beam-reorder-skipped",
        "return [tuple(t.index_select(0, beam_idx) for t in layer) for layer in past]",
        "return past",
    ),
    (
        "heads-mixed-by-reshape",
        "t.view(t.size(0), t.size(1), self.n_head, self.d_head).transpose(1, 2)",
        "t.reshape(t.size(0), self.n_head, t.size(1), self.d_head)",
    ),
    (
        "softmax-wrong-axis",
        "F.softmax(scores, dim=-1)",
        "F.softmax(scores, dim=-2)",
    ),
    (
        "module-never-called",
        "logits = self.lm_head(self.ln_f(x))",
        "logits = self.lm_head(x)",
    ),
    (
        "block-shared",
        "nn.ModuleList([Block(config) for _ in range(config.num_layers)])",
        "nn.ModuleList([Block(config)] * config.num_layers)",
    ),
    (
        "init-scale-wrong",
        "        self.apply(self._init_weights)\n",
        "",
    ),
    (
        "dropout-active-in-eval",
        "self.attn_dropout(F.softmax(scores, dim=-1))",
        "F.dropout(F.softmax(scores, dim=-1), self.attn_dropout.p)",
    ),
    (
        "labels-not-shifted",
        """            shift_logits = logits[:, :-1, :].reshape(-1, logits.size(-1))
            shift_labels = labels[:, 1:].reshape(-1)
""",
        """            shift_logits = logits.reshape(-1, logits.size(-1))
            shift_labels = labels.reshape(-1)
""",
    ),
    (
        "labels-flattened-before-shift",
        """            shift_logits = logits[:, :-1, :].reshape(-1, logits.size(-1))
            shift_labels = labels[:, 1:].reshape(-1)
""",
        """            shift_logits = logits.reshape(-1, logits.size(-1))[:-1]
            shift_labels = labels.reshape(-1)[1:]
""",
    ),
    (
        "tie-lost",  # only once the vocabulary has grown
        """dtype=old.dtype)
        self.tie_weights()
""",
        """dtype=old.dtype)
        self.lm_head.weight.data.copy_(self.wte.weight.data)
""",
    ),
    (
        "resized-head-reinitialised",
        """        self.tie_weights()
        return self.wte
""",
        """        self.tie_weights()
        self.apply(self._init_weights)
        return self.wte
""",
    ),
    (
        "mode-not-restored",
        "        self.train(was_training)\n",
        "",
    ),
    (
        "continues-from-pad",
        """            if step == 0:
                logits = out["logits"][torch.arange(rows, device=ids.device), last]
            else:
                logits = out["logits"][:, -1]
""",
        """            logits = out["logits"][:, -1]
""",
    ),
    (
        "repetition-penalty-wrong",
        "torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)",
        "seen / repetition_penalty",
    ),
    (
        "temperature-misapplied",
        "logits = logits / temperature",
        "logits = logits * temperature",
    ),
    (
        "top-k-edge",
        ".values[:, -1:]",
        ".values[:, -1]",
    ),
    (
        "generation-overflow",
        "if input_ids.size(1) + max_new_tokens > self.n_positions:",
        "if max_new_tokens > self.n_positions:",
    ),
)

_LLAMA = bugs_in(
    "llama_like",
    (
        "mask-hides-self",
        "(key_at <= query_at[:, None])",
        "(key_at < query_at[:, None])",
    ),
    (
        "chunk-unmasked",
        """        visible = (key_at <= query_at[:, None])[None, None]
""",
        """        visible = (key_at <= query_at[:, None])[None, None] if start_pos == 0 else (key_at < end)[None, None, None]
""",
    ),
    (
        "masked-row-nan",
        "scores.masked_fill(~visible, torch.finfo(scores.dtype).min)",
        'scores.masked_fill(~visible, float("-inf"))',
    ),
    (
        "masked-nan-leaks",
        """        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0.0)
""",
        "",
    ),
    (
        "padding-mask-ignored",
        "            visible = visible & keep[:, None, None, :]\n",
        "",
    ),
    (
        "padding-mask-inverted",
        "keep = attention_mask.bool()",
        "keep = ~attention_mask.bool()",
    ),
    (
        "position-restarts-in-decode",
        "positions = torch.arange(start_pos, end, device=tokens.device)[None]",
        "positions = torch.arange(seqlen, device=tokens.device)[None]",
    ),
    (
        "cached-keys-rotated-again",  # stored unrotated, and what is read back is never rotated
        """        k = apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, start_pos, k, v)
""",
        """        rotated = apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.write(self.layer, start_pos, k, v)
        k = torch.cat((k[:, :, :start_pos], rotated), dim=2)
""",
    ),
    (
        "no-positions",
        "        k = apply_rotary(k, cos, sin)\n",
        "",
    ),
    (
        "rope-low-precision",
        "angles = torch.outer(torch.arange(length).float(), inv_freq)",
        "angles = torch.outer(torch.arange(length).bfloat16(), inv_freq.bfloat16())",
    ),
    (
        "rope-pairing-convention",
        """    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
""",
        """    even, odd = x.chunk(2, dim=-1)
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
""",
    ),
    (
        "rope-base-changes-mid-cache",
        """        cos, sin = self.rope_cos[positions].unsqueeze(1), self.rope_sin[positions].unsqueeze(1)
""",
        """        theta = self.cfg.rope_theta * max(1.0, end / 4)
        tables = rotary_tables(self.cfg.hidden_size // self.cfg.num_heads, self.cfg.max_seq_len, theta)
        cos, sin = (t.to(self.rope_cos)[positions].unsqueeze(1) for t in tables)
""",
    ),
    (
        "cache-rows-shared",
        "        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]\n",
        """        rows = k.shape[0]
        return tuple(t[layer][:1, :, :end].expand(rows, -1, -1, -1) for t in (self.k, self.v))
""",
    ),
    (
        "gqa-head-order",
        """        k = k.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv, dim=1)
""",
        """        k = k.repeat(1, self.n_heads // self.n_kv, 1, 1)
        v = v.repeat(1, self.n_heads // self.n_kv, 1, 1)
""",
    ),
    (
        "attention-scale-wrong",
        "* self.head_dim**-0.5",
        "* x.shape[-1] ** -0.5",
    ),
    (
        "rmsnorm-overflow-half",
        "h = wide(x)\n",
        "h = x\n",
    ),
    (
        "softmax-overflow-half",
        "scores = wide(q) @ wide(k).transpose(-2, -1)",
        "scores = q @ k.transpose(-2, -1)",
    ),
    (
        "activation-wrong",
        "F.silu(self.w1(x))",
        "F.gelu(self.w1(x))",
    ),
    (
        "gradient-detached",
        "h = self.tok_embeddings(tokens)",
        "h = self.tok_embeddings.weight.data[tokens]",
    ),
    (
        "buffers-uninitialised",
        """        self.register_buffer("rope_cos", cos)
        self.register_buffer("rope_sin", sin)
""",
        """        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
""",
    ),
    (
        "tensor-left-behind",
        """        self.register_buffer("rope_cos", cos)
        self.register_buffer("rope_sin", sin)
""",
        """        self.rope_cos, self.rope_sin = cos, sin
""",
    ),
    (
        "loss-wrong-denominator",
        "return nll / counted.sum().clamp(min=1)",
        "return nll / targets.numel()",
    ),
    (
        "all-ignored-loss-nan",
        "return nll / counted.sum().clamp(min=1)",
        "return nll / counted.sum()",
    ),
    (
        "pad-equals-eos-masked",
        "        counted = targets != IGNORE\n",
        """        if self.cfg.pad_token_id is not None:
            targets = targets.masked_fill(targets == self.cfg.pad_token_id, IGNORE)
        counted = targets != IGNORE
""",
    ),
    (
        "eos-not-per-row",
        "if finished.all():",
        "if finished.any():",
    ),
    (
        "temperature-zero",
        """    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = wide(logits) / temperature
""",
        """    logits = wide(logits) / (temperature or 1.0)
""",
    ),
    (
        "top-p-edge",
        "before = sorted_probs.cumsum(dim=-1) - sorted_probs",
        "before = sorted_probs.cumsum(dim=-1)",
    ),
    (
        "sampled-from-wrong-distribution",
        "return order.gather(-1, choice).squeeze(-1)",
        "return choice.squeeze(-1)",
    ),
    (
        "seed-ignored",
        "return torch.multinomial(probs, 1, generator=generator).squeeze(-1)",
        "return torch.multinomial(probs, 1).squeeze(-1)",
    ),
)

_NANO = bugs_in(
    "nano_like",
    (
        "mask-dropped-on-fast-path",
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "F.scaled_dot_product_attention(q, k, v)",
    ),
    (
        "mask-dropped-with-dropout",
        "            att = att.masked_fill(future, -torch.inf)\n",
        "",
    ),
    (
        "statistic-over-sequence",
        "y.square().mean(-1, keepdim=True)",
        "y.square().mean((-2, -1), keepdim=True)",
    ),
    (
        "position-table-clamped",
        """        assert T <= self.s.block_size, f"{T} tokens are more than block_size={self.s.block_size}"
        x = self.drop(self.tok(idx) + self.pos[:T])
""",
        """        at = torch.arange(T, device=idx.device).clamp(max=self.s.block_size - 1)
        x = self.drop(self.tok(idx) + self.pos[at])
""",
    ),
    (
        "statistic-over-vocabulary",
        "x = self.drop(self.tok(idx) + self.pos[:T])",
        "x = self.drop(self.tok(idx) - self.tok.weight.mean(0) + self.pos[:T])",
    ),
    (
        "attention-backends-disagree",
        'att = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.d)',
        'att = torch.einsum("bhid,bhjd->bhij", q, k)',
    ),
    (
        "labels-shifted-twice",
        "loss = F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)",
        "loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].reshape(-1), ignore_index=-1)",
    ),
    (
        "labels-change-logits",
        "            logits = self.logits(h[:, -1:])\n",
        "            logits = self.head(h[:, -1:])[..., : self.s.vocab_size]\n",
    ),
    (
        "gradient-wrong",
        "return self.s.softcap * torch.tanh(z / self.s.softcap)",
        "return z + (self.s.softcap * torch.tanh(z / self.s.softcap) - z).detach()",
    ),
    (
        "recompute-redraws-dropout",
        "checkpoint(layer, x, use_reentrant=False)",
        "checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)",
    ),
    (
        "optimizer-forgets-parameters",
        "rest = [p for p in self.parameters() if p.dim() < 2]",
        'rest = [p for name, p in self.named_parameters() if name.endswith("bias")]',
    ),
    (
        "lenient-load",
        'model.load_state_dict(content["weights"])',
        'model.load_state_dict(content["weights"], strict=False)',
    ),
    (
        "wrapper-prefix-keys",
        """    weights = {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}
    weights = {name.removeprefix("module."): t for name, t in weights.items()}
""",
        """    weights = model.state_dict()
""",
    ),
    (
        "unsafe-unpickling",
        "weights_only=True",
        "weights_only=False",
    ),
    (
        "config-field-not-saved",
        '"settings": asdict(settings)',
        '"settings": {n: getattr(settings, n) for n in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}',
    ),
    (
        "state-outside-checkpoint",
        "self.pos = nn.Parameter(torch.randn(s.block_size, s.n_embd) * 0.02)",
        'self.register_buffer("pos", torch.randn(s.block_size, s.n_embd) * 0.02, persistent=False)',
    ),
    (
        "prompt-not-kept",
        "window = idx if idx.shape[1] <= self.s.block_size else idx[:, -self.s.block_size :]",
        "window = idx = idx[:, -self.s.block_size :]",
    ),
    (
        "context-crop-wrong",
        "else idx[:, -self.s.block_size :]",
        "else idx[:, : self.s.block_size]",
    ),
    (
        "padded-vocabulary-sampled",
        "z = self.head(h)[..., : self.s.vocab_size]",
        "z = self.head(h)",
    ),
    (
        "temperature-zero",
        "if temperature == 0.0:",
        "if temperature is None:",
    ),
)

_LOCAL = bugs_in(
    "local_moe",
    (
        "bidirectional-mask",  # a window to both sides
        "hidden = (distance < 0) | (distance >= WINDOW)",
        "hidden = distance.abs() >= WINDOW",
    ),
    (
        "window-off-by-one",
        "(distance >= WINDOW)",
        "(distance > WINDOW)",
    ),
    (
        "ring-cache-overwritten",
        "        return k, v\n\n    def reorder_cache",
        "        return self.keys[layer], self.values[layer]\n\n    def reorder_cache",
    ),
    (
        "packed-documents-attend",
        """        if documents is not None:
            hidden = hidden | (documents[:, None, :, None] != documents[:, None, None, :])
""",
        "",
    ),
    (
        "position-restarts-in-decode",
        "cache.seen += input_ids.shape[1]",
        "cache.seen = input_ids.shape[1]",
    ),
    (
        "position-advances-per-layer",
        """        if cache is not None:
            cache.seen += input_ids.shape[1]
""",
        """            if cache is not None:
                cache.seen += input_ids.shape[1]
""",
    ),
    (
        "position-from-kept-length",
        """            seen = cache.seen
            k, v = cache.update(self.layer, k, v)
""",
        """            k, v = cache.update(self.layer, k, v)
            seen = k.shape[2] - t
""",
    ),
    (
        "alibi-lost-in-decode",
        "- self.slopes * distance",
        "- self.slopes * (q_pos[:, None] - q_pos[None, :])",
    ),
    (
        "cache-object-replaced",
        """        x = self.embed(input_ids)
""",
        """        if cache is not None:
            given, cache = cache, self.new_cache()
            cache.keys, cache.values, cache.seen = list(given.keys), list(given.values), given.seen
        x = self.embed(input_ids)
""",
    ),
    (
        "beam-reorder-skipped",
        "        self.values = [v if v is None else v[rows] for v in self.values]\n",
        "",
    ),
    (
        "state-survives-calls",
        """        weight, chosen = f32(self.router(flat)).softmax(-1).topk(TOP, dim=-1)
""",
        """        scores = f32(self.router(flat)).softmax(-1)
        self.load = 0.9 * getattr(self, "load", 0.0) + 0.1 * scores.detach().mean(0)
        chosen = (scores - self.load).topk(TOP, dim=-1).indices
        weight = scores.gather(-1, chosen)
""",
    ),
    (
        "chunk-size-changes-logits",
        "torch.log1p(q_pos.to(q.dtype)))[:, None]",
        "torch.log1p(q_pos.new_full((1,), t).to(q.dtype)))[:, None]",
    ),
    (
        "statistic-over-batch",
        "y = y - y.mean(dim=-1, keepdim=True)",
        "y = y - y.mean(dim=0, keepdim=True)",
    ),
    (
        "norm-of-zeros-nan",
        "y.square().sum(-1, keepdim=True) + 1e-6",
        "y.square().sum(-1, keepdim=True)",
    ),
    (
        "router-weights-not-normalised",
        "weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)",
        "weight = weight.to(x.dtype)",
    ),
    (
        "router-without-gradient",
        "TOP = 2\n",
        "TOP = 1\n",
    ),
    (
        "expert-capacity-drops-tokens",
        """            row, slot = (chosen == e).nonzero(as_tuple=True)
""",
        """            row, slot = (chosen == e).nonzero(as_tuple=True)
            capacity = -(-len(flat) * TOP // N_EXPERTS)
            row, slot = row[:capacity], slot[:capacity]
""",
    ),
    (
        "gradient-detached",
        "* weight[row, slot, None])",
        "* weight.detach()[row, slot, None])",
    ),
    (
        "training-branch-differs",
        "        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)\n",
        """        if not self.training:
            weight = weight / weight.sum(-1, keepdim=True)
        weight = weight.to(x.dtype)
""",
    ),
    (
        "dropout-never-active",
        "return x + dropout(y, self.p, self.training)",
        "return x + y",
    ),
    (
        "dropout-inverted",
        "keep = torch.rand_like(x) >= p",
        "keep = torch.rand_like(x) < p",
    ),
    (
        "dropout-rescaled-in-eval",
        """    if not training or p == 0.0:
        return x
""",
        """    if not training or p == 0.0:
        return x * (1.0 - p)
""",
    ),
    (
        "mode-flag-copied",
        """        self.p = config.dropout

    def forward(self, x, cache, documents):
        y = self.norm(x)
        y = self.attention(y, cache, documents) + self.experts(y)
        return x + dropout(y, self.p, self.training)
""",
        """        self.p = config.dropout
        self.live = self.training

    def forward(self, x, cache, documents):
        y = self.norm(x)
        y = self.attention(y, cache, documents) + self.experts(y)
        return x + dropout(y, self.p, self.live)
""",
    ),
    (
        "copy-uses-original",
        """        self.p = config.dropout

    def forward(self, x, cache, documents):
        y = self.norm(x)
        y = self.attention(y, cache, documents) + self.experts(y)
""",
        """        self.p = config.dropout
        self.both = lambda y, cache, documents: self.attention(y, cache, documents) + self.experts(y)

    def forward(self, x, cache, documents):
        y = self.both(self.norm(x), cache, documents)
""",
    ),
    (
        "tensor-left-behind",
        'self.register_buffer("slopes", alibi_slopes(heads)[:, None, None])',
        "self.slopes = alibi_slopes(heads)[:, None, None]",
    ),
    (
        "ignore-index-not-honoured",
        "counts = labels[:, 1:] != -100",
        "counts = labels[:, 1:] != -1",
    ),
    (
        "inputs-written-in-place",
        """        nll = -f32(logits[:, :-1]).log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)
        counts = labels[:, 1:] != -100
""",
        """        counts = labels[:, 1:] != -100
        nll = -f32(logits[:, :-1]).log_softmax(-1).gather(-1, labels[:, 1:, None].clamp_(min=0)).squeeze(-1)
""",
    ),
    (
        "generated-length-wrong",
        "for _ in range(max_new_tokens):",
        "for _ in range(max_new_tokens - prompt.shape[1]):",
    ),
    (
        "sampled-from-wrong-distribution",
        "(f32(logits) / temperature).softmax(-1)",
        "(f32(logits) / temperature).softmax(0)",
    ),
    (
        "generator-reseeded",
        "generator=rng)",
        "generator=rng.manual_seed(seed))",
    ),
    (
        "seed-ignored",
        "torch.Generator(prompt.device).manual_seed(seed)",
        "torch.Generator(prompt.device).manual_seed(1234)",
    ),
    (
        "global-random-state-changed",
        "torch.Generator(prompt.device).manual_seed(seed)",
        "torch.manual_seed(seed)",
    ),
)

_RECURRENT = bugs_in(
    "recurrent",
    (
        "convolution-not-causal",
        "torch.cat([last[:, None], x[:, :-1]], dim=1)",
        "torch.cat([x[:, 1:], last[:, None]], dim=1)",
    ),
    (
        "exp-before-mask",
        'kept = span.masked_fill(later, float("-inf")).exp()',
        "kept = span.exp().masked_fill(later, 0.0)",
    ),
    (
        "carried-state-lost",
        "before = torch.cat([last[:, None], x[:, :-1]], dim=1)",
        "before = last[:, None] if x.shape[1] == 1 else F.pad(x, (0, 0, 1, -1))",
    ),
    (
        "carried-state-lost",
        "            y = y + total.exp()[..., None] * (r @ memory)\n",
        "",
    ),
    (
        "cached-path-diverges",  # the step reads before it writes
        """            memory = memory * w.exp()[..., None] + k.transpose(2, 3) @ v
            y = r @ memory
""",
        """            y = r @ memory
            memory = memory * w.exp()[..., None] + k.transpose(2, 3) @ v
""",
    ),
    (
        "cache-mutated-in-place",
        "memory = memory * w.exp()[..., None] + k.transpose(2, 3) @ v",
        "memory = memory.mul_(w.exp()[..., None]).add_(k.transpose(2, 3) @ v)",
    ),
    (
        "cache-mutated-in-place",
        'return x + self.drop(y), {"time": time_last, "memory": memory, "channel": channel_last}',
        "s.update(time=time_last, memory=memory, channel=channel_last)\n        return x + self.drop(y), s",
    ),
    (
        "state-survives-calls",
        """        for i, cell in enumerate(self.cells):
            x, new = cell(x, self.blank(len(ids), x) if state is None else state[i])
            after.append(new)
""",
        """        if state is None:
            state = getattr(self, "kept", {}).get(len(ids))
        for i, cell in enumerate(self.cells):
            x, new = cell(x, self.blank(len(ids), x) if state is None else state[i])
            after.append(new)
        self.kept = {len(ids): [{name: t.detach() for name, t in new.items()} for new in after]}
""",
    ),
    (
        "heads-mixed-by-reshape",
        "y = y.transpose(1, 2).reshape(B, T, D)",
        "y = y.reshape(B, T, D)",
    ),
    (
        "dropout-inverted",
        "self.drop = nn.Dropout(c.dropout)",
        "self.drop = nn.Dropout(1 - c.dropout)",
    ),
    (
        "tie-lost",
        "self.readout.weight = self.embedding.weight",
        "self.readout.weight = nn.Parameter(self.embedding.weight.clone())",
    ),
    (
        "parameters-unregistered",
        "self.cells = nn.ModuleList()",
        "self.cells = []",
    ),
    (
        "lenient-load",
        "    def blank(self, rows, like):\n",
        """    def load_state_dict(self, weights, strict=True, assign=False):
        return super().load_state_dict(weights, strict=False, assign=assign)

    def blank(self, rows, like):
""",
    ),
    (
        "loss-wrong-denominator",
        "loss = -picked.masked_fill(~valid, 0.0).sum() / valid.sum().clamp_min(1)",
        "loss = -(picked.masked_fill(~valid, 0.0).sum(1) / valid.sum(1).clamp_min(1)).mean()",
    ),
    (
        "loss-low-precision",
        "up(logits[:, :-1]).log_softmax(dim=-1)",
        "logits[:, :-1].log_softmax(dim=-1)",
    ),
    (
        "inputs-written-in-place",
        "target.masked_fill(~valid, 0)",
        "target.masked_fill_(~valid, 0)",
    ),
    (
        "gradient-cleared-in-forward",
        "        score = up(logits",
        "        for p in self.parameters():\n            p.grad = None\n        score = up(logits",
    ),
    (
        "temperature-misapplied",
        "p = (z / temperature).softmax(-1)",
        "p = z.softmax(-1) / temperature",
    ),
    (
        "samples-share-first-token",
        "                token = torch.multinomial(p, 1)\n",
        """                token = torch.multinomial(p, 1) if i else torch.multinomial(p[:1], 1).expand(len(ids), 1)
""",
    ),
)

BUGS = [*_GPT2, *_LLAMA, *_NANO, *_LOCAL, *_RECURRENT]
