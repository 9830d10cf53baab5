"""A prompt read at once: what it costs as it grows, without filling a cache and with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diymodel.bench.decoders import random_ids
from diymodel.bench.figures import Fit, Spread, ratios, seconds_text
from diymodel.bench.models import build
from diymodel.bench.peers import same_weights
from diymodel.bench.results import finish
from diymodel.bench.timing import Effort, Work, interleave
from diymodel.config import DIYConfig
from diymodel.cost import prefill_flops
from diymodel.model import DIYForCausalLM

WAYS = {"ours": "ours", "ours_uncached": "ours, no cache filled", "transformers": "transformers"}


def works(model: DIYForCausalLM, peer: Any, config: DIYConfig, length: int, device: torch.device) -> dict[str, Work]:
    """The logits after a prompt, by each way; ``peer`` may be None."""
    ids = random_ids(config.vocab_size, 1, length, device)
    found = {
        "ours": Work(lambda: model(ids, use_cache=True, logits_to_keep=1)),
        "ours_uncached": Work(lambda: model(ids, logits_to_keep=1)),
    }
    if peer is not None:
        found["transformers"] = Work(lambda: peer(input_ids=ids, use_cache=True, logits_to_keep=1))
    return found


def run(
    document: dict[str, Any],
    config: DIYConfig,
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    path: Path | None,
) -> None:
    """Measure, print and write."""
    model = build(config).to(device)
    peer, document["peer_skipped"] = same_weights(model)
    model.to(dtype)
    if peer is not None:
        peer.to(dtype)
    else:
        print(f"transformers: skipped, {document['peer_skipped']}")
    print(f"{'prompt':>6} {'FLOPs':>9} {'ours':>10} {'tokens/s':>9}  others' seconds by ours, in turn")
    rows = []
    for length in lengths:
        with torch.inference_mode():
            rounds = interleave(works(model, peer, config, length, device), device, effort)
        flops = prefill_flops(config, length, logits_to_keep=1)
        row: dict[str, Any] = {"length": length, "flops": flops}
        row |= {way: {"seconds": Spread.of(seconds)} for way, seconds in rounds.items()}
        seconds = row["ours"]["seconds"].median
        row |= {"tokens_per_second": length / seconds, "flops_per_second": flops / seconds}
        row["ratios"] = {f"{way}/ours": ratios(rounds[way], rounds["ours"]) for way in rounds if way != "ours"}
        others = "  ".join(f"{WAYS[name.split('/')[0]]} {ratio.text()}" for name, ratio in row["ratios"].items())
        print(f"{length:>6} {flops:>9.3g} {seconds_text(seconds):>10} {length / seconds:>9.4g}  {others}", flush=True)
        rows.append(row)
    fits = {
        "flops": Fit.of(lengths, [row["flops"] for row in rows]),
        "seconds": Fit.of(lengths, [row["ours"]["seconds"].median for row in rows]),
    }
    for name, fit in fits.items():
        print(f"exponent of {name}: {fit.exponent:.2f}  [{' '.join(f'{slope:.2f}' for slope in fit.local)}]")
    finish(document | {"rows": rows, "fits": fits}, path)
