"""Several documents in one row, told apart by their numbers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from diymodel.verify.registry import check
from diymodel.verify.strategies import chunk_sizes
from diymodel.verify.trial import Trial


@check(
    "packing.documents_do_not_meet",
    title="changing one of several documents in a row changes no logit of the others",
    step="5.1",
    needs=("packing",),
    causes=("packed-documents-attend", "statistic-over-sequence"),
)
def documents_do_not_meet(trial: Trial) -> None:
    lm = trial.model()
    ids = trial.tokens(lm, min_length=2)
    B, T = ids.shape
    sizes = trial.draw("documents", st.lists(chunk_sizes(T), min_size=B, max_size=B))
    documents = torch.stack([torch.arange(1, len(row) + 1).repeat_interleave(torch.tensor(row)) for row in sizes]).to(
        trial.device
    )
    place = trial.draw("place", st.integers(0, T - 1))
    shift = trial.draw("shift", st.integers(1, lm.config.vocab_size - 1))
    edited = ids.clone()
    edited[:, place] = (ids[:, place] + shift) % lm.config.vocab_size
    before, after = lm.packed(ids, documents), lm.packed(edited, documents)
    other = documents != documents[:, place, None]
    trial.varies(after[~other], before[~other])
    what = f"in rows of documents of the lengths {sizes}, changing the token at {place} must change no other document"
    trial.same(after[other], before[other], what, lm, lambda: lm.packed(ids, documents)[other])
