"""What the harness's options may be, and their defaults. Without torch, so that arguments are parsed at once."""

from __future__ import annotations

PROFILES = {"quick": 10, "standard": 40, "thorough": 200}  # trials a check
PROFILE = "standard"  # by default
DTYPES = ("float64", "float32", "bfloat16", "float16")  # of the modules
CHECK_SECONDS = 60.0  # after which a check begins no further trial, and a single trial is taken for hung
