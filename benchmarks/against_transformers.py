"""Our model against transformers' ``LlamaForCausalLM`` on the same weights, in turn, in one process.

``python -m benchmarks.against_transformers [--device cpu|cuda] [--shapes T,S] …``

Both run eagerly with scaled-dot-product attention; inference is under ``torch.inference_mode`` for both. A ratio above
1 says how many times as fast ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    Effort,
    Spread,
    Work,
    describe_machine,
    finish,
    interleave,
    parser,
    ratios,
    seconds_text,
    start,
)
from benchmarks.shapes import (
    build,
    check_same_logits,
    describe_shape,
    llama_config,
    llama_like,
    parse_shapes,
    random_ids,
    transformers_missing,
)
from diymodel import DIYConfig, DIYForCausalLM, next_token_loss
from diymodel.cost import num_parameters

PROMPT, NEW_TOKENS = 32, 64
STEPS_PER_ROUND = 32  # decode steps before starting again from the prompt
TRAIN_BATCH, TRAIN_LENGTH = 8, 128
TITLES = {
    "decode_step": f"decode step, prompt {PROMPT}",
    "generate": f"generate {NEW_TOKENS} tokens",
    "training_step": f"training step, {TRAIN_BATCH} x {TRAIN_LENGTH}",
    "build": "build the model",
}
Works = dict[str, Work]


class _Steps:
    """Decode steps that follow one another, as in a generation: each continues the cache that the last one made."""

    def __init__(self, forward: Callable[[Tensor, Any], Any], prompt: Tensor) -> None:
        self.forward = forward
        self.prompt = prompt
        self.token = prompt[:, :1].clone()
        self.past: Any = None

    def prefill(self) -> None:
        self.past = self.forward(self.prompt, None)

    def step(self) -> None:
        self.past = self.forward(self.token, self.past)

    def work(self) -> Work:
        return Work(self.step, self.prefill, STEPS_PER_ROUND)


def decode_step(model: DIYForCausalLM, peer: Any, prompt: Tensor) -> Works:
    """One more token on a cache."""

    def ours(ids: Tensor, past: Any) -> Any:
        return model(ids, past_key_values=past, use_cache=True)[1]

    def theirs(ids: Tensor, past: Any) -> Any:
        return peer(input_ids=ids, past_key_values=past, use_cache=True).past_key_values

    works = {"ours": _Steps(ours, prompt).work()}
    return works if peer is None else works | {"transformers": _Steps(theirs, prompt).work()}


def generate(model: DIYForCausalLM, peer: Any, prompt: Tensor) -> Works:
    """A greedy continuation, all of it."""
    mask = torch.ones_like(prompt)  # without one, transformers takes prompt tokens equal to pad_token_id for padding

    def ours() -> Tensor:
        return model.generate(prompt, NEW_TOKENS)

    def theirs() -> Tensor:
        return peer.generate(
            prompt, attention_mask=mask, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )

    works = {"ours": ours} if peer is None else {"ours": ours, "transformers": theirs}
    for name, run in works.items():
        length = run().shape[1]
        if length != PROMPT + NEW_TOKENS:
            raise ValueError(f"{name}: generate made {length - PROMPT} tokens and not {NEW_TOKENS}")
    return {name: Work(run) for name, run in works.items()}


def training_step(model: DIYForCausalLM, peer: Any, ids: Tensor, dtype: torch.dtype) -> Works:
    """Forward, loss, backward and AdamW, the same loss and settings for both; half types by autocast."""

    def work(trained: nn.Module, logits_of: Callable[[], Tensor]) -> Work:
        trained.train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
                logits = logits_of()
            next_token_loss(logits, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        return Work(run)

    works = {"ours": work(model, lambda: model(ids))}
    if peer is not None:
        works["transformers"] = work(peer, lambda: peer(input_ids=ids, use_cache=False).logits)
    return works


def build_model(config: DIYConfig, has_peer: bool) -> Works:
    """Construct the model with random weights, on the CPU."""
    works = {"ours": Work(lambda: DIYForCausalLM(config))}
    if has_peer:
        from transformers import LlamaForCausalLM

        peer_config = llama_config(config)
        works["transformers"] = Work(lambda: LlamaForCausalLM(peer_config))
    return works


def measure_shape(
    config: DIYConfig, device: torch.device, dtype: torch.dtype, effort: Effort, has_peer: bool, train: bool
) -> dict[str, Any]:
    """All figures of one shape: a part of the results file."""
    model, peer, difference = _pair(config, device, has_peer)
    prompt = random_ids(config, 1, PROMPT, device)
    model.to(dtype)
    if peer is not None:
        peer.to(dtype)
    figures = {}
    with torch.inference_mode():
        figures["decode_step"] = _figures(decode_step(model, peer, prompt), device, effort)
        figures["generate"] = _figures(generate(model, peer, prompt), device, effort)
    if train:
        model, peer, _ = _pair(config, device, has_peer)  # a trained model is another one
        ids = random_ids(config, TRAIN_BATCH, TRAIN_LENGTH, device)
        figures["training_step"] = _figures(training_step(model, peer, ids, dtype), device, effort)
    del model, peer
    figures["build"] = _figures(build_model(config, has_peer), torch.device("cpu"), effort)
    return {
        "config": describe_shape(config),
        "parameters": num_parameters(config),
        "largest_logit_difference": difference,
        "figures": figures,
    }


def _pair(config: DIYConfig, device: torch.device, has_peer: bool) -> tuple[DIYForCausalLM, Any, float | None]:
    """Our model and the peer's in float32, and how far their logits lie apart."""
    model = build(config).to(device)
    if not has_peer:
        return model, None, None
    peer = llama_like(model)
    return model, peer, check_same_logits(model, peer)


def _figures(works: Works, device: torch.device, effort: Effort) -> dict[str, Any]:
    rounds = interleave(works, device, effort)
    figures: dict[str, Any] = {name: Spread.of(seconds) for name, seconds in rounds.items()}
    if "transformers" in rounds:
        figures["ratio"] = ratios(rounds["transformers"], rounds["ours"])
    return figures | {"rounds": len(rounds["ours"])}


def print_shape(name: str, result: dict[str, Any]) -> None:
    """A shape's figures as rows of the table."""
    for figure, title in TITLES.items():
        row = result["figures"].get(figure)
        if row is None:
            print(f"{name:<5} {title:<24} {'not measured: see --train':>24}")
            continue
        ours, theirs, ratio = row["ours"], row.get("transformers"), row.get("ratio")
        peer_columns = "" if ratio is None else f" {seconds_text(theirs.median):>12} {_ratio_text(ratio):>22}"
        print(f"{name:<5} {title:<24} {seconds_text(ours.median):>12}{peer_columns}", flush=True)


def _ratio_text(ratio: Spread) -> str:
    return f"{ratio.median:.2f} [{ratio.q1:.2f}–{ratio.q3:.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shapes", default="T256,T,S,M,L", help="shapes to measure")
    options.add_argument("--train", help="shapes whose training step is measured too (default: all on a GPU, T256,T,S)")
    args = options.parse_args(argv)
    device, dtype = start(options, args)
    try:
        shapes = parse_shapes(args.shapes)
        trained = parse_shapes(args.train or (args.shapes if device.type == "cuda" else "T256,T,S"))
    except ValueError as error:
        options.error(str(error))
    missing = transformers_missing()
    document: dict[str, Any] = {
        "schema": 1,
        "benchmark": "against_transformers",
        "machine": describe_machine(device),
        "device": args.device,
        "dtype": args.dtype,
        "quick": args.quick,
        "inference": "torch.inference_mode, eager, scaled-dot-product attention, batch 1",
        "peer_skipped": missing,
        "shapes": {},
    }
    if missing:
        print(f"transformers: skipped, {missing}")
    print(f"{'shape':<5} {'':<24} {'ours':>12}" + ("" if missing else f" {'transformers':>12} {'times as fast':>22}"))
    effort = Effort.quick() if args.quick else Effort()
    for name, config in shapes.items():
        result = measure_shape(config, device, dtype, effort, has_peer=not missing, train=name in trained)
        print_shape(name, result)
        document["shapes"][name] = result
    finish(document, args.json)


if __name__ == "__main__":
    main()
