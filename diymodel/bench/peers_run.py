"""Our model beside its peers: everybody's decode step in turn, everybody's own ``generate``, and construction.

A ratio above 1 says how many times as fast ours is. All run eagerly under ``torch.inference_mode`` with
scaled-dot-product attention, except the compiled steps, which say so.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diymodel.bench.bandwidth import matrix_vector_products
from diymodel.bench.decoders import OwnDecoder, random_ids
from diymodel.bench.figures import Spread, ratios, seconds_text
from diymodel.bench.models import build
from diymodel.bench.peers import PEERS, PeerMissing, Rival, Room
from diymodel.bench.peers.rival import logit_difference
from diymodel.bench.results import finish, plain, read_results, write_results
from diymodel.bench.timing import Effort, Work, interleave
from diymodel.compiled import compiled_decoder
from diymodel.config import DIYConfig
from diymodel.cost import num_parameters
from diymodel.int8 import quantize_int8
from diymodel.model import DIYForCausalLM

NEW_TOKENS = 64
STEPS_PER_ROUND = 32  # decode steps before starting again from the prompt
COMPILED = ("transformers_static", "litgpt", "gpt_fast_like")
Generate = Callable[[Tensor, int], Tensor]  # prompts (B, T), new tokens -> (B, T + new)
FIGURES = {"decode_step": "decode step", "generate": f"generate {NEW_TOKENS} tokens", "construct": "build the model"}


def resumed(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The document of an earlier run, to go on with.

    Raises:
        ValueError: that run had other settings.
    """
    earlier = read_results(path, "peers")
    for key in ("device", "dtype", "quick", "prompt", "batch", "compiled"):
        if earlier[key] != document[key]:
            raise ValueError(f"--resume: {path} has {key} {earlier[key]!r} and this run {document[key]!r}")
    return document | {"shapes": earlier["shapes"]}


def run(
    document: dict[str, Any],
    shapes: Mapping[str, DIYConfig],
    chosen: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    path: Path | None,
) -> None:
    """Measure the shapes that the document does not have yet; each is printed and written as it is done."""
    for name, config in shapes.items():
        if name in document["shapes"]:
            print(f"{name}: kept")
            continue
        print(f"{name}: {num_parameters(config):,} parameters")
        result = measure_shape(
            config, chosen, (document["batch"], document["prompt"]), device, dtype, effort, document["compiled"]
        )
        result["measured"] = document["machine"]["date"]
        print_shape(result)
        document["shapes"][name] = plain(result)
        if path is not None:
            write_results(path, document)
        gc.collect()
    finish(document, path)


def measure_shape(
    config: DIYConfig,
    chosen: Sequence[str],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    compiled: bool,
) -> dict[str, Any]:
    """All figures of one shape, a part of the results file; ``size`` is rows and tokens of the prompt."""
    rows, prompt_length = size
    model = build(config).to(device)
    room = Room(rows, prompt_length + STEPS_PER_ROUND + NEW_TOKENS)
    rivals, skipped, differences = _rivals(model, chosen, room, compiled)
    model.to(dtype)
    for rival in rivals.values():
        rival.to(dtype)
    prompt = random_ids(config.vocab_size, rows, prompt_length, device)
    ours = {"ours": _own(model), "ours_unchecked": _unchecked(model)}
    if dtype == torch.float32:
        ours["ours_bfloat16"] = _unchecked(build(config).to(device, torch.bfloat16))
        ours["ours_int8"] = _unchecked(quantize_int8(build(config)).to(device, torch.bfloat16))
    loops: dict[str, Generate] = {name: r.generate for name, r in (ours | rivals).items() if r.generate is not None}
    if compiled:
        ours["ours_compiled"] = _compiled(model, room)
        loops["ours_compiled"] = functools.partial(model.generate, compile=True)
    figures = {}
    with torch.inference_mode():
        floor = {"floor": Work(matrix_vector_products(model, rows))}
        steps = {name: decode_step(rival, prompt) for name, rival in (ours | rivals).items()}
        figures["decode_step"] = _figures(steps | floor, device, effort)
        figures["generate"] = _figures({name: generation(loop, prompt) for name, loop in loops.items()}, device, effort)
    makers = {name: rival.construct for name, rival in (ours | rivals).items() if rival.construct is not None}
    works = {name: Work(construct) for name, construct in makers.items()}
    figures["construct"] = _figures(works, torch.device("cpu"), effort)
    return {
        "config": dict(sorted(vars(config).items())),
        "parameters": num_parameters(config),
        "own_weights": [name for name, rival in rivals.items() if not rival.same_weights],
        "largest_logit_difference": differences,
        "skipped": skipped,
        "figures": figures,
    }


def _rivals(
    model: DIYForCausalLM, chosen: Sequence[str], room: Room, compiled: bool
) -> tuple[dict[str, Rival], dict[str, str], dict[str, float]]:
    """The peers that are here, why others are not, and how far the logits of those on our weights lie from ours."""
    rivals: dict[str, Rival] = {}
    skipped: dict[str, str] = {}
    differences: dict[str, float] = {}
    for name in chosen:
        for compile_ in (False, True) if compiled and name in COMPILED else (False,):
            title = f"{name}_compiled" if compile_ else name
            try:
                rival = PEERS[name](model, room, compile_)
            except PeerMissing as missing:
                skipped[title] = str(missing)
                continue
            if rival.same_weights:
                differences[title] = logit_difference(model, rival, room.rows)
            rivals[title] = rival
    return rivals, skipped, differences


def _own(model: DIYForCausalLM) -> Rival:
    decoder = OwnDecoder(model)

    def generate(prompt: Tensor, tokens: int) -> Tensor:
        return model.generate(prompt, tokens)

    return Rival(
        lambda ids: decoder.extend(ids, None),
        lambda ids, past: model(ids, past_key_values=past, use_cache=True),  # with its checks, as a stranger calls it
        same_weights=True,
        to=model.to,
        generate=generate,
        construct=lambda: DIYForCausalLM(model.config),
    )


def _unchecked(model: DIYForCausalLM) -> Rival:
    """Our model as its own generate calls it."""
    decoder = OwnDecoder(model)
    return Rival(lambda ids: decoder.extend(ids, None), decoder.extend, same_weights=True, to=lambda dtype: None)


def _compiled(model: DIYForCausalLM, room: Room) -> Rival:
    """Our model as ``generate(compile=True)`` calls it."""
    with torch.inference_mode(), compiled_decoder(model, room.rows, room.positions) as decoder:
        pass  # compiled

    def prefill(ids: Tensor) -> tuple[Tensor, None]:
        logits, past = model(ids, use_cache=True, logits_to_keep=1)
        decoder.start(past, ids.shape[1])
        return logits, None

    return Rival(prefill, lambda ids, state: (decoder.step(ids), state), same_weights=True, to=lambda dtype: None)


def decode_step(rival: Rival, prompt: Tensor) -> Work:
    """One more token on a cache: steps that follow one another, as in a generation."""
    token = prompt[:, :1].clone()
    state: Any = None

    def prefill() -> None:
        nonlocal state
        _, state = rival.prefill(prompt)

    def step() -> None:
        nonlocal state
        _, state = rival.step(token, state)

    return Work(step, prefill, STEPS_PER_ROUND)


def generation(generate: Generate, prompt: Tensor) -> Work:
    """A greedy continuation, all of it.

    Raises:
        ValueError: it is not as long as it should be.
    """
    length = generate(prompt, NEW_TOKENS).shape[1] - prompt.shape[1]
    if length != NEW_TOKENS:
        raise ValueError(f"generate made {length} tokens and not {NEW_TOKENS}: their times could not be compared")
    return Work(lambda: generate(prompt, NEW_TOKENS))


def _figures(works: Mapping[str, Work], device: torch.device, effort: Effort) -> dict[str, Any]:
    rounds = interleave(works, device, effort)
    return {
        "rounds": len(rounds["ours"]),
        "seconds": {name: Spread.of(seconds) for name, seconds in rounds.items()},
        "ratios": {f"{name}/ours": ratios(rounds[name], rounds["ours"]) for name in rounds if name != "ours"},
    }


def print_shape(result: Mapping[str, Any]) -> None:
    """A shape's figures as a table."""
    print(f"  {'':<18} {'':<26} {'seconds':>10}  times as fast is ours, in turn")
    for figure, title in FIGURES.items():
        found = result["figures"][figure]
        for name, spread in found["seconds"].items():
            ratio = found["ratios"].get(f"{name}/ours")
            own = "  (weights of its own)" if name in result["own_weights"] else ""
            text = "" if ratio is None else ratio.text()
            print(f"  {title:<18} {name:<26} {seconds_text(spread.median):>10}  {text}{own}", flush=True)
    for name, reason in result["skipped"].items():
        print(f"  {name}: skipped, {reason}")
