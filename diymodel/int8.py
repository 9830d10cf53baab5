"""Weight-only int8: every matrix as whole numbers from -127 to 127 and one scale a row.

Decoding one row reads each weight once and does little else, so a weight of one byte is read in half the time of
bfloat16's two. The activations, the embedding, the norms and the cache stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from diymodel._compat import int8_linear
from diymodel.linear import Linear
from diymodel.model import DIYForCausalLM

_LARGEST = 127
_BLOCK = 32  # columns that the kernel reads at a time, beyond the end of a row as well
_FEW = 16  # rows up to which torch's kernel for int8 weights is faster than converting the weight


class Int8Linear(nn.Module):
    """``x @ (weight · scale).T``, with ``weight`` (out, in) int8, zeros behind each row, and ``scale`` (out,).

    In bfloat16 on a CPU, few rows are multiplied by torch's kernel for it. Elsewhere the weight is converted to the
    dtype of ``x`` first, which is exact, and slower than a float weight unless it is compiled; in float16 it is scaled
    before the product, which rounds it.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        wide = weight.detach().float()
        # Powers of two would waste a bit, float32 would be rounded by bfloat16(): the next bfloat16 above.
        scale = (wide.abs().amax(1) / _LARGEST).mul_(1 + 2.0**-8).bfloat16()
        scale = scale.masked_fill(scale == 0, 1)
        whole = (wide / scale.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
        padded = nn.functional.pad(whole, (0, -self.in_features % _BLOCK))
        self.register_buffer("weight", padded.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < rows <= _FEW and int8_linear is not None:
            flat = x.reshape(rows, self.in_features)
            if self.in_features % _BLOCK:
                flat = nn.functional.pad(flat, (0, -self.in_features % _BLOCK))
            return int8_linear(flat, self.weight, self.scale).view(*x.shape[:-1], self.out_features)
        weight = self.weight[:, : self.in_features].to(x.dtype)
        if x.dtype == torch.float16:  # whose largest number a sum of whole numbers up to 127 soon exceeds
            return nn.functional.linear(x, weight * self.scale[:, None])
        return nn.functional.linear(x, weight) * self.scale


def quantize_int8(model: DIYForCausalLM) -> DIYForCausalLM:
    """A copy of a model for inference, its matrices in int8: a quarter of the memory of float32, half of bfloat16's.

    A weight is off by at most half a scale, 1/254 of the largest of its row; logits, by some hundredths of their
    size. It is fast in bfloat16: ``quantize_int8(model).bfloat16()``. Where embedding and head share a weight, the
    embedding keeps it and the head gets its own in int8. The int8 weights get no gradient, and checkpoints hold
    no quantised model: save the model, and quantise what is loaded.

    Args:
        model: stays as it is.

    Raises:
        ValueError: it is quantised already, or has weights that are not finite, or without values (meta device).
    """
    heads = ("lm_head",) if model.config.tie_word_embeddings else ()
    quantised = copy.deepcopy(model)
    names = [name for name, part in quantised.named_modules() if isinstance(part, Linear) or name in heads]
    if not names:
        raise ValueError("the model has no float matrices: it is quantised already")
    for name in names:
        weight = quantised.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta or not bool(weight.isfinite().all()):
            reason = "is on the meta device" if weight.is_meta else "holds a value that is not finite"
            raise ValueError(f"{name}.weight {reason}: it has no scale")
        parent, _, child = name.rpartition(".")
        setattr(quantised.get_submodule(parent), child, Int8Linear(weight))
    if heads:
        config = dataclasses.replace(model.config, tie_word_embeddings=False)
        quantised.config = quantised.model.config = config
    return quantised.train(model.training)
