"""What tables a module keeps."""

from __future__ import annotations

from diymodel.verify.symptoms import Patient, distinct_tokens, symptom


@symptom(
    "tables.are_complex",
    "a buffer holds complex numbers, of which to(dtype) keeps the real parts alone",
    "有一个 buffer 存的是复数，而 to(dtype) 只保留实部",
    ("state.moves",),
    ("complex-table-cast",),
)
def _are_complex(patient: Patient) -> bool | None:
    lm = patient.lm()
    lm.logits(distinct_tokens(lm))  # some are made by the first call
    return any(buffer.is_complex() for buffer in lm.module.buffers())
