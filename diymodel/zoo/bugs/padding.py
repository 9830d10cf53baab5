"""Bugs that padding brings out."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "statistic-over-sequence",
        "hub",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); x = x + x.mean(1, keepdim=True)",
        kills=("padding.right_changes_nothing",),
        where="Hub",
    ),
    Bug(
        "padded-batch-shared-position",
        "hub",
        "attention_mask[:, None, None, :].bool()",
        "attention_mask[:, None, None, :].flip(-1).bool() | torch.eye(T, dtype=torch.bool)",
        kills=("padding.right_changes_nothing",),
        where="Hub",
    ),
    Bug(
        "bidirectional-mask",
        "hub",
        "(torch.arange(start + T) <= position[:, None])[None, None]",
        "torch.ones(1, 1, T, start + T, dtype=torch.bool)\n        attention_mask = None",
        kills=("padding.content_irrelevant",),
        where="Hub",
    ),
    Bug(
        "statistic-over-sequence",
        "hub",
        "x = self.embed(input_ids)",
        "x = self.embed(input_ids); x = x / x.std()",
        kills=("padding.content_irrelevant",),
        where="Hub",
    ),
    Bug(
        "masked-row-nan",
        "hub",
        "torch.finfo(x.dtype).min",
        "-torch.inf",
        kills=("padding.all_padding_finite",),
        where="HubBlock",
    ),
]
