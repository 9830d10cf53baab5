"""Bugs of the switch between training and evaluation."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "dropout-never-active",
        "rotary",
        "x, kv = layer(",
        "x, kv = layer.eval()(",
        kills=("modes.dropout_active_in_training",),
        where="Rotary",
    ),
    Bug(
        "training-branch-differs",
        "plain",
        "self.embed(x) +",
        "self.embed(x) * (1.5 if self.training else 1) +",
        kills=("modes.agree_without_dropout",),
        where="Plain",
    ),
    Bug(
        "mode-flag-copied",
        "nanogpt",
        "self.dropout, self.training)\n        x =",
        "self.dropout, True)\n        x =",
        kills=("modes.followed_at_every_depth",),
        where="NanoBlock",
    ),
    Bug(
        "mode-not-restored",
        "rotary",
        "def forward(self, input_ids: Tensor, past",
        "def train(self, mode: bool = True):\n        self.training = mode; return self\n\n    def forward(self, input_ids: Tensor, past",
        kills=("modes.followed_at_every_depth",),
        where="Rotary",
    ),
]
