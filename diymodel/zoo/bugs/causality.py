"""Bugs that let a position see the future, or keep it from seeing itself and its past."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "mask-sees-next-token",
        "rotary",
        "arange(k.shape[2]) <= position[:, None]",
        "arange(k.shape[2]) <= position[:, None] + 1",
        kills=("causality.edit",),
        where="RotaryBlock",
    ),
    Bug("bidirectional-mask", "plain", ", mask=future", "", kills=("causality.edit",), where="Plain"),
    Bug("mask-value-too-small", "nanogpt", "-torch.inf", "-8.0", kills=("causality.edit",), where="NanoBlock"),
    Bug(
        "softmax-wrong-axis",
        "nanogpt",
        "scores.softmax(-1)",
        "scores.softmax(-2)",
        kills=("causality.edit",),
        where="NanoBlock",
    ),
    Bug(
        "statistic-over-sequence",
        "hub",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); x = x - x.mean(1, keepdim=True)",
        kills=("causality.edit",),
        where="Hub",
    ),
    Bug(
        "statistic-over-sequence",
        "plain",
        "triu(1)",
        "triu(1) & (T < 3)",
        kills=("causality.truncation",),
        where="Plain",
    ),
    Bug("mask-sees-next-token", "nanogpt", ".tril())", ".tril(1))", kills=("causality.truncation",), where="NanoBlock"),
    Bug(
        "mask-dropped-with-dropout",
        "nanogpt",
        "scores = scores.masked_fill(self.mask[:T, :T] == 0, -torch.inf)",
        "if not (self.training and self.dropout): scores = scores.masked_fill(self.mask[:T, :T] == 0, -torch.inf)",
        kills=("causality.in_training",),
        where="NanoBlock",
    ),
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
        " + self.wpe(torch.arange(T))",
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
]
