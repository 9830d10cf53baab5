"""Bugs that any forward pass shows: shapes, state, rows that meet, too long input."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug("masked-row-nan", "nanogpt", ".tril())", ".tril(-1))", kills=("shape.logits",), where="NanoBlock"),
    Bug(
        "statistic-over-sequence",
        "plain",
        "self.embed(x) +",
        "(e := self.embed(x)) / (1 + (e - e.mean(1, keepdim=True)).square().sum(1, keepdim=True) / (T - 1)) +",
        kills=("shape.shortest",),
        where="Plain",
    ),
    Bug(
        "contiguous-input-assumed",
        "plain",
        "self.embed(x) +",
        "self.embed(x.view(-1)).view(*x.shape, -1) +",
        kills=("forward.memory_layout",),
        where="Plain",
    ),
    Bug(
        "contiguous-input-assumed",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids.as_strided(input_ids.shape, (input_ids.shape[1], 1)))",
        kills=("forward.memory_layout",),
        where="Rotary",
    ),
    Bug(
        "position-table-clamped",
        "plain",
        "randn(config.max_seq_len",
        "randn(config.max_seq_len - 1",
        kills=("shape.longest",),
        where="Plain",
    ),
    Bug(
        "dropout-active-in-eval",
        "nanogpt",
        "weights = F.dropout(scores.softmax(-1), self.dropout, self.training)",
        "weights = F.dropout(scores.softmax(-1), self.dropout)",
        kills=("forward.deterministic",),
        where="NanoBlock",
    ),
    Bug(
        "state-survives-calls",
        "rotary",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); x = x + getattr(self, 'kept', 0); self.kept = x.mean().item()",
        kills=("forward.deterministic",),
        where="Rotary",
    ),
    Bug(
        "inputs-written-in-place",
        "hub",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); input_ids[input_ids == 1] = 0",
        kills=("forward.inputs_unchanged",),
        where="Hub",
    ),
    Bug(
        "statistic-over-batch",
        "plain",
        "self.embed(x) +",
        "self.embed(x) - self.embed(x).mean(0) +",
        kills=("batch.row_alone",),
        where="Plain",
    ),
    Bug(
        "cache-rows-shared",
        "rotary",
        "k.repeat_interleave(self.groups, 1)",
        "k[:1].repeat_interleave(self.groups, 1).expand_as(q[:, :, :1].expand(B, self.heads, k.shape[2], self.size))",
        kills=("batch.permutation",),
        where="RotaryBlock",
    ),
    Bug(
        "position-table-clamped",
        "plain",
        "self.positions[:T]",
        "self.positions[torch.arange(T, device=x.device).clamp(max=len(self.positions) - 1)]",
        kills=("context.overlong_refused",),
        where="Plain",
    ),
    Bug(
        "generation-overflow",
        "rotary",
        "if cached + input_ids",
        "if input_ids",
        kills=("context.overlong_refused",),
        where="Rotary",
    ),
    Bug(
        "statistic-over-batch",
        "learned",
        "x = self.drop(",
        "embedded = embedded - embedded.mean(0); x = self.drop(",
        kills=("batch.row_alone",),
        where="Learned",
    ),
    Bug(
        "contiguous-input-assumed",
        "headwise",
        "tok_emb = self.token_embedding_table(idx)",
        "tok_emb = self.token_embedding_table(idx.view(B * T)).view(B, T, -1)",
        kills=("forward.memory_layout",),
        where="GPTLanguageModel",
    ),
    Bug(
        "statistic-over-batch",
        "switch",
        "self.router(flat)",
        "self.router((hidden_states - hidden_states.mean(0)).flatten(0, 1))",
        kills=("batch.row_alone",),
        where="SparseMLP",
    ),
    Bug(
        "statistic-over-batch",
        "parallel",
        "x = self.wte(tokens)\n",
        "x = self.wte(tokens)\n        x = x / (1 + x.square().mean(0))\n",
        kills=("batch.row_alone",),
        where="ParallelLM",
    ),
    Bug(
        "cache-rows-shared",
        "switch",
        "torch.cat((past[0], k), dim=2)",
        "torch.cat((past[0][:1].expand(bsz, -1, -1, -1), k), dim=2)",
        kills=("decode.cached_equals_full",),
        where="SwitchLayer",
    ),
    Bug(
        "position-table-clamped",
        "kept",
        'if end > self.hp.max_seq_len:\n            raise ValueError(f"position {end} is beyond max_seq_len={self.hp.max_seq_len}")\n        x = self.wte(input_ids) + self.wpe(torch.arange(start, end, device=input_ids.device))',
        "x = self.wte(input_ids) + self.wpe(torch.arange(start, end, device=input_ids.device).clamp(max=self.wpe.num_embeddings - 1))",
        kills=("context.overlong_refused",),
        where="Kept",
    ),
    Bug(
        "position-table-clamped",
        "headwise",
        "nn.Embedding(config.max_seq_len, config.hidden_size)",
        "nn.Embedding(config.max_seq_len - 1, config.hidden_size)",
        kills=("shape.longest",),
        where="GPTLanguageModel",
    ),
    Bug(
        "inputs-written-in-place",
        "switch",
        "hidden_states = self.embed_tokens(input_ids)\n",
        "input_ids[input_ids == input_ids.max()] = 0\n        hidden_states = self.embed_tokens(input_ids)\n",
        kills=("forward.inputs_unchanged",),
        where="SwitchForCausalLM",
    ),
    Bug(
        "dropout-active-in-eval",
        "kept",
        "mask, self.dropout if self.training else 0.0)",
        "mask, self.dropout)",
        kills=("modes.dropout_off_in_eval",),
        where="KeptBlock",
    ),
    Bug(
        "dropout-active-in-eval",
        "scribe",
        "F.dropout(att.softmax(-1), p=self.p, training=self.training)",
        "F.dropout(att.softmax(-1), p=self.p)",
        kills=("forward.deterministic",),
        where="ScribeLayer",
    ),
    Bug(
        "masked-row-nan",
        "headwise",
        "torch.tril(torch.ones(block_size, block_size))",
        "torch.tril(torch.ones(block_size, block_size), diagonal=-1)",
        kills=("shape.logits",),
        where="Head",
    ),
    Bug(
        "generation-overflow",
        "switch",
        "total > self.config.max_seq_len",
        "input_ids.shape[1] > self.config.max_seq_len",
        kills=("context.overlong_refused",),
        where="SwitchForCausalLM",
    ),
    Bug(
        "statistic-over-batch",
        "experts",
        "scores = torch.sigmoid(F.linear(x, self.gate))",
        "scores = F.linear(x, self.gate)\n        scores = torch.sigmoid(scores - scores.mean(0))",
        kills=("batch.row_alone",),
        where="MoE",
    ),
    Bug(
        "position-table-clamped",
        "resettable",
        "self.pos_emb(torch.arange(start, start + T, device=in_idx.device))",
        "self.pos_emb(torch.arange(start, start + T, device=in_idx.device) % self.pos_emb.num_embeddings)",
        kills=("context.order_beyond",),
        where="Resettable",
    ),
    Bug(
        "position-table-clamped",
        "postnorm",
        """\
        if length > self.n_ctx:
            raise ValueError(f"input of {length} tokens is longer than n_ctx={self.n_ctx}")
        x = self.embed_scale * self.embed_tokens(input_ids)
        x = self.embed_dropout(self.embed_norm(x + self.positions[:length].to(x.dtype)))
""",
        """\
        x = self.embed_scale * self.embed_tokens(input_ids)
        positions = self.positions[[min(i, self.n_ctx - 1) for i in range(length)]]
        x = self.embed_dropout(self.embed_norm(x + positions.to(x.dtype)))
""",
        kills=("context.order_beyond",),
        where="PostNorm",
    ),
    Bug(
        "position-table-clamped",
        "learned",
        """\
        if start + T > self.n_positions:
            raise ValueError(f"{start + T} positions are more than {self.n_positions}")
        real = torch.ones(B, start + T, device=input_ids.device) if attention_mask is None else attention_mask
        real = real.bool()
        if real.shape != (B, start + T):
            raise ValueError(f"attention_mask must be {(B, start + T)}, cached and new tokens, not {tuple(real.shape)}")
        if position_ids is None:
            position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, start:]
""",
        """\
        if T > self.n_positions:
            raise ValueError(f"{T} positions are more than {self.n_positions}")
        real = torch.ones(B, start + T, device=input_ids.device) if attention_mask is None else attention_mask
        real = real.bool()
        if real.shape != (B, start + T):
            raise ValueError(f"attention_mask must be {(B, start + T)}, cached and new tokens, not {tuple(real.shape)}")
        if position_ids is None:
            position_ids = (real.long().cumsum(1) - 1).clamp(0, self.n_positions - 1)[:, start:]
""",
        kills=("context.order_beyond",),
        where="Learned",
    ),
]
