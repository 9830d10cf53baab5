"""Bugs of rows that hold several documents."""

from __future__ import annotations

from diymodel.zoo.bug import Bug

BUGS = [
    Bug(
        "packed-documents-attend",
        "packed",
        "(ids[:, None, :] == ids[:, :, None])",
        "(ids[:, None, :] >= 0)  # not padding",
        kills=("packing.documents_do_not_meet",),
        where="Packed",
    ),
    Bug(
        "statistic-over-sequence",
        "packed",
        "x = self.dropout(self.embed(tokens)",
        "x = self.embed(tokens); x = self.dropout(x - x.cumsum(1) / (place + 1)[:, None]",
        kills=("packing.documents_do_not_meet",),
        where="Packed",
    ),
    Bug(
        "packed-documents-attend",
        "postnorm",
        "(segment_ids[:, None, :, None] != segment_ids[:, None, None, :])",
        "(segment_ids[:, None, None, :] == 0)",
        kills=("packing.documents_do_not_meet",),
        where="PostNorm",
    ),
    Bug(
        "statistic-over-sequence",
        "postnorm",
        "x = self.embed_scale * self.embed_tokens(input_ids)",
        "x = self.embed_tokens(input_ids)\n        x = x * self.embed_scale / (1 + x.norm(dim=-1, keepdim=True).cumsum(1))",
        kills=("packing.documents_do_not_meet",),
        where="PostNorm",
    ),
]
