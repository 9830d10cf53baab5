"""Bugs of experts that do not take every token that is sent to them."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "expert-capacity-drops-tokens",
        "switch",
        "token = (chosen == index).nonzero()[:, 0]",
        "token = (chosen == index).nonzero()[:, 0][: max(1, len(flat) // 2)]",
        kills=("batch.row_alone", "causality.truncation"),
        where="SparseMLP",
    ),
    Bug(
        "expert-capacity-drops-tokens",
        "switch",
        "token = (chosen == index).nonzero()[:, 0]",
        "token = (chosen == index).nonzero()[:, 0]\n            if self.training:\n                token = token[weight[token].topk(min(len(token), max(1, len(flat) // 3))).indices]",
        kills=("modes.agree_without_dropout", "causality.in_training"),
        where="SparseMLP",
    ),
    Bug(
        "expert-capacity-drops-tokens",
        "experts",
        "weights = torch.zeros_like(scores).scatter(-1, indices, kept)",
        "weights = torch.zeros_like(scores).scatter(-1, indices, kept)\n        if self.training:\n            place = (weights > 0).flatten(0, 1).cumsum(0).view_as(scores)\n            weights = weights * (place <= max(1, x[..., 0].numel() // 3))",
        kills=("modes.agree_without_dropout",),
        where="MoE",
    ),
    Bug(
        "expert-capacity-drops-tokens",
        "experts",
        "kept, indices = scores.topk(self.n_active, dim=-1)\n        weights = torch.zeros_like(scores).scatter(-1, indices, kept)",
        "kept, indices = scores.topk(max(1, x.shape[1] // 2), dim=1)\n        weights = torch.zeros_like(scores).scatter(1, indices, kept)",
        kills=("causality.edit", "causality.truncation"),
        where="MoE",
    ),
]
