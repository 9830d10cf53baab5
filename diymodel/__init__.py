"""diymodel: a complete, compact causal language model, and a harness that verifies any causal language model.

Names are imported on first use, so ``import diymodel`` and ``from diymodel import DIYConfig`` do not import torch.
Functions that are called like their module are imported from it: ``from diymodel.train import train``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diymodel.checkpoint import load_checkpoint as load_checkpoint
    from diymodel.checkpoint import load_pretrained as load_pretrained
    from diymodel.checkpoint import save_checkpoint as save_checkpoint
    from diymodel.checkpoint import save_pretrained as save_pretrained
    from diymodel.config import DIYConfig as DIYConfig
    from diymodel.config import TrainConfig as TrainConfig
    from diymodel.int8 import quantize_int8 as quantize_int8
    from diymodel.loss import next_token_loss as next_token_loss
    from diymodel.model import DIYForCausalLM as DIYForCausalLM
    from diymodel.model import DIYModel as DIYModel

__version__ = "0.1.0"

_HOME = {
    "DIYConfig": "config",
    "TrainConfig": "config",
    "DIYModel": "model",
    "DIYForCausalLM": "model",
    "next_token_loss": "loss",
    "quantize_int8": "int8",
    "save_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_pretrained": "checkpoint",
    "load_pretrained": "checkpoint",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
