"""A training step: forward, loss, backward and AdamW, in float32, under bfloat16 autocast, and compiled.

One loss function and one fused AdamW setting for all, so that only the model differs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diymodel._compat import FUSED_DEVICES
from diymodel.bench.compiled import quiet
from diymodel.bench.decoders import random_ids
from diymodel.bench.figures import Spread, ratios, seconds_text
from diymodel.bench.models import build
from diymodel.bench.peers import same_weights
from diymodel.bench.results import finish
from diymodel.bench.timing import Effort, Work, interleave
from diymodel.config import DIYConfig
from diymodel.cost import prefill_flops
from diymodel.loss import next_token_loss

BASE = "transformers float32"  # what the others are compared with, where it is installed; else our float32


def training_step(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], ids: Tensor, dtype: torch.dtype, compiled: bool = False
) -> Work:
    """One step of a model; half types by autocast.

    Args:
        logits_of: ids (B, T) to logits (B, T, V).
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ids.device.type in FUSED_DEVICES)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            logits = logits_of(ids)
        return next_token_loss(logits, ids)

    forward = quiet(torch.compile(loss_of, dynamic=False)) if compiled else loss_of

    def run() -> None:
        forward(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    if compiled:  # what is made lazily, the rotary table and the gradients, would make it compile again
        loss_of(ids)
        run()
        run()
    return Work(run)


def works(config: DIYConfig, ids: Tensor, compiled: bool) -> tuple[dict[str, Work], str | None]:
    """The steps by name, and why transformers is not among them.

    Every one trains a model of its own: what one has learned, or how its weights lie in memory, is nothing to another.
    """
    device = ids.device
    found: dict[str, Work] = {}
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
    if compiled:
        kinds += [(f"{name} compiled", dtype, True) for name, dtype, _ in kinds]
    for name, dtype, compile_ in kinds:
        model = build(config).to(device)
        found[f"ours {name}"] = training_step(model, model, ids, dtype, compile_)
    skipped = None
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        peer, skipped = same_weights(build(config).to(device))
        if peer is not None:
            found[f"transformers {name}"] = training_step(peer, _logits_of(peer), ids, dtype)
    return found, skipped


def _logits_of(peer: Any) -> Callable[[Tensor], Tensor]:
    def logits_of(ids: Tensor) -> Tensor:
        logits: Tensor = peer(input_ids=ids, use_cache=False).logits
        return logits

    return logits_of


def run(
    document: dict[str, Any],
    config: DIYConfig,
    size: tuple[int, int],
    device: torch.device,
    effort: Effort,
    compiled: bool,
    path: Path | None,
) -> None:
    """Measure, print and write; ``size`` is rows and tokens a row."""
    ids = random_ids(config.vocab_size, *size, device)
    steps, document["peer_skipped"] = works(config, ids, compiled)
    if document["peer_skipped"]:
        print(f"transformers: skipped, {document['peer_skipped']}")
    rounds = interleave(steps, device, effort)
    base = BASE if BASE in rounds else "ours float32"
    flops = 3 * prefill_flops(config, size[1], size[0])  # the backward pass is twice the forward
    print(f"{size[0]} × {size[1]} tokens\n{'':<26} {'step':>10} {'tokens/s':>9}  times as fast as {base}, in turn")
    document |= {"flops": flops, "base": base, "rounds": len(rounds[base]), "steps": {}, "ratios": {}}
    for name, seconds in rounds.items():
        spread = Spread.of(seconds)
        speed = ids.numel() / spread.median
        document["steps"][name] = {"seconds": spread, "tokens_per_second": speed}
        ratio = ratios(rounds[base], seconds)
        if name != base:
            document["ratios"][f"{base}/{name}"] = ratio
        print(f"{name:<26} {seconds_text(spread.median):>10} {speed:>9.4g}  {ratio.text()}", flush=True)
    finish(document, path)
