"""Bugs that keep a position from seeing itself, or where it and its past stand."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "mask-hides-self",
        "plain",
        "return self.head(self.encoder(self.embed(x) + self.positions[:T], mask=future))",
        "return self.head(self.encoder(self.embed(nn.functional.pad(x[:, :-1], (1, 0))) + self.positions[:T], mask=future))",
        kills=("sensitivity.sees_itself_and_its_past",),
        where="Plain",
    ),
    Bug(
        "no-positions",
        "nanogpt",
        " + self.wpe(torch.arange(T, device=idx.device))",
        "",
        kills=("sensitivity.order_matters",),
        where="NanoGPT",
    ),
    Bug(
        "no-positions",
        "rotary",
        "position[:, None] * freq",
        "0 * freq",
        kills=("sensitivity.order_matters",),
        where="rotate",
    ),
    Bug(
        "no-positions",
        "windowed",
        "q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)",
        "q = rotate(q, position, self.theta)",
        kills=("sensitivity.shift_invariance",),
        where="WindowedBlock",
    ),
    Bug(
        "rope-low-precision",
        "windowed",
        "position[:, None] * theta",
        "position[:, None].to(x.dtype) * theta",
        kills=("sensitivity.shift_invariance",),
        where="rotate",
    ),
    Bug(
        "no-positions",
        "headwise",
        "x = tok_emb + pos_emb",
        "x = tok_emb",
        kills=("sensitivity.order_matters",),
        where="GPTLanguageModel",
    ),
    Bug(
        "no-positions",
        "parallel",
        "        q = apply_rotary(q, pos, self.n_rot, self.base)\n        k = apply_rotary(k, pos, self.n_rot, self.base)\n",
        "",
        kills=("sensitivity.order_matters",),
        where="ParallelLayer",
    ),
    Bug(
        "no-positions",
        "rolling",
        "xq, xk = rope(xq, freqs), rope(xk, freqs)",
        "xq = rope(xq, freqs)",
        kills=("sensitivity.shift_invariance",),
        where="Attention",
    ),
    Bug(
        "no-positions",
        "scribe",
        "x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)",
        "x = self.embed_tokens(input_ids)",
        kills=("sensitivity.order_matters",),
        where="Scribe",
    ),
    Bug(
        "rope-low-precision",
        "rolling",
        "angle = torch.outer(torch.arange(start, end, device=device).double(), inv)",
        "angle = torch.outer(torch.arange(start, end, device=device).bfloat16(), inv.bfloat16()).double()",
        kills=("sensitivity.shift_invariance",),
        where="Rolling",
    ),
    Bug(
        "no-positions",
        "experts",
        "        h = h + self.pos(torch.arange(seqlen, device=tokens.device))\n",
        "",
        kills=("sensitivity.order_matters",),
        where="Experts",
    ),
]
