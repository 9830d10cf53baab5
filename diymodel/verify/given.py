"""What an author hands over with a model, where it cannot be found by trying.

Shapes: B batch, T sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from diymodel.config import DIYConfig

Save = Callable[[nn.Module, Path], object]  # writes a file, or a directory of them
Load = Callable[[Path], nn.Module]
# module, ids (B, T), offset -> logits (B, T, V) with every position + offset
Shifted = Callable[[nn.Module, Tensor, int], Tensor]
# config, state_dict, ids (B, T) -> logits (B, T, V), float64
Reference = Callable[[DIYConfig, Mapping[str, Tensor], Tensor], Tensor]


class Checkpoint(NamedTuple):
    """How a subject is saved, and built again from what was saved."""

    save: Save
    load: Load


class Opened(NamedTuple):
    """A model with the weights that were saved in a directory."""

    module: nn.Module  # in eval mode, in the dtype of the weights
    config: Any  # its sizes, by our names
    problems: Sequence[str]  # weights that are missing, left over or of another shape, a line each
