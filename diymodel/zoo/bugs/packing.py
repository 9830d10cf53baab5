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
]
