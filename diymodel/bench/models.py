"""Our model in a shape, for measuring."""

from __future__ import annotations

import torch

from diymodel.config import DIYConfig
from diymodel.model import DIYForCausalLM


def build(config: DIYConfig, seed: int = 0) -> DIYForCausalLM:
    """Our model in eval mode; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DIYForCausalLM(config).eval()
