"""The command line: ``train`` and ``generate``; the other commands are in verify/, zoo/ and bench/command.py.

Exit codes: 0 done, 1 it ran and did not succeed, 2 it could not start (one line on stderr says why), 130 Ctrl-C.
Torch is imported by the commands only, so that ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from diymodel import __version__
from diymodel.bench.command import add_bench
from diymodel.config import OVERFIT, PRESETS, DIYConfig, TrainConfig
from diymodel.verify.command import add_commands
from diymodel.zoo.command import add_zoo

if TYPE_CHECKING:
    from diymodel.model import DIYForCausalLM
    from diymodel.tokenizer import Tokenizer

DEFAULT_PRESET = "default"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        argv: the arguments after the program's name. None: those of this process.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; nothing here needs it
    try:
        args = _parser().parse_args(argv)
    except SystemExit as exit_:  # argparse has printed the help or the error
        return int(exit_.code or 0)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python flushes stdout once more at exit: give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FloatingPointError as error:
        return _complain(args, error, 1)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _complain(args, error, 2)
    return code


def _complain(args: argparse.Namespace, error: Exception, code: int) -> int:
    message = " ".join(str(error).split())
    print(f"diymodel {args.command_name}: error: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="diymodel", description="Verify any causal language model; train a compact one, and generate with it."
    )
    parser.add_argument("--version", action="version", version=f"diymodel {__version__}")
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_generate(commands)
    add_commands(commands)
    add_zoo(commands)
    add_bench(commands)
    return parser


# -------------------------------------------------------------------------------------------------------------- train


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on text",
        description="Train a model on text. Ctrl-C saves and stops; --resume goes on from there, bit for bit.",
    )
    parser.set_defaults(command=_train)
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="text files and folders of them (default: the language reference that comes with Python)",
    )
    parser.add_argument("--out", metavar="RUN", help="directory for checkpoint, metrics and loss curve")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in RUN; its settings need not be repeated, its PATHs do"
    )
    parser.add_argument(
        "--overfit",
        action="store_true",
        help="instead: learn one sequence of 20 tokens by heart, the smallest proof that learning works",
    )
    presets = "; ".join(f"{name}: {preset.doc}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset", choices=PRESETS, help=f"settings to begin with (default: {DEFAULT_PRESET}). {presets}"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)")
    preset = PRESETS[DEFAULT_PRESET]
    tokenizers = {"vocab_size": "the tokenizer's", "pad_token_id": "the tokenizer's"}
    _add_fields(parser.add_argument_group("model"), DIYConfig, {**preset.model, **tokenizers})
    _add_fields(parser.add_argument_group("training"), TrainConfig, preset.train)


def _add_fields(group: Any, config: type[DIYConfig] | type[TrainConfig], preset: Mapping[str, Any]) -> None:
    """An option for each field. One that is not given leaves no trace in the namespace, so that a preset can stand."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        doc, _, doc_default = field.metadata["doc"].partition(" (default: ")
        default = preset.get(field.name, field.default)
        shown = doc_default.rstrip(")") if default is None else default
        settings: dict[str, Any] = {"help": f"{doc} (default: {shown})".replace("%", "%%")}
        hint = hints[field.name]
        if hint is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            settings["choices"] = typing.get_args(hint)
        else:
            kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
            settings |= {"type": kinds[0], "metavar": "N" if kinds[0] is int else "X" if kinds[0] is float else "NAME"}
        group.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, **settings)


def _given(args: argparse.Namespace, config: type[DIYConfig] | type[TrainConfig]) -> dict[str, Any]:
    """The fields that were given as options."""
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(config) if hasattr(args, field.name)}


def _train(args: argparse.Namespace) -> int:
    if args.overfit:
        return _overfit(args)
    if args.out is None:
        raise ValueError("say where the run goes with --out RUN")
    from diymodel.checkpoint import read_checkpoint
    from diymodel.data import default_documents, read_documents, read_tokenizer
    from diymodel.tokenizer import ByteTokenizer, tokenizer_from_dict
    from diymodel.train import CHECKPOINT_NAME, train

    tokenizer: Tokenizer | None = read_tokenizer(args.tokenizer) if args.tokenizer else None
    model_values: dict[str, Any] = {}
    train_values: dict[str, Any] = {}
    if args.resume and (path := Path(args.out, CHECKPOINT_NAME)).exists():
        # What is not given now is as it was; what is given and differs, train() refuses.
        config, _, training = read_checkpoint(path)
        if training and "train_config" in training:
            model_values, train_values = config.to_dict(), training["train_config"]
            tokenizer = tokenizer or tokenizer_from_dict(training["tokenizer"])
    if args.preset or not train_values:
        preset = PRESETS[args.preset or DEFAULT_PRESET]
        model_values |= preset.model
        train_values |= preset.train
    tokenizer = tokenizer or ByteTokenizer()
    model_values = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id} | model_values
    model_config = DIYConfig.from_dict(model_values | _given(args, DIYConfig))
    train_config = TrainConfig.from_dict(train_values | _given(args, TrainConfig))
    documents = read_documents(args.paths) if args.paths else default_documents()
    result = train(
        model_config, train_config, documents, args.out, tokenizer=tokenizer, resume=args.resume, log=_print_line
    )
    return 130 if result.interrupted else 0


def _overfit(args: argparse.Namespace) -> int:
    model_values, train_values = _given(args, DIYConfig), _given(args, TrainConfig)
    used = {"steps", "batch_size", "learning_rate", "log_every", "seed", "device"}
    idle = [f"--{name.replace('_', '-')}" for name in train_values if name not in used]
    idle += [f"--{name}" for name in ("out", "resume", "preset", "tokenizer") if getattr(args, name)]
    if args.paths or idle:
        raise ValueError(f"--overfit has its own text and saves nothing: leave out {', '.join([*args.paths, *idle])}")
    import torch

    from diymodel.overfit import OVERFIT_LOSS, overfit
    from diymodel.tokenizer import ByteTokenizer

    torch.set_num_threads(1)  # the model is so small that threads only wait for each other
    vocabulary = {"vocab_size": ByteTokenizer.vocab_size, "pad_token_id": ByteTokenizer.pad_id}
    model_config = DIYConfig.from_dict({**vocabulary, **OVERFIT.model, **model_values})
    steps = train_values.get("steps", OVERFIT.train["steps"])
    train_config = TrainConfig.from_dict({**OVERFIT.train, "warmup_steps": min(1, steps), **train_values})
    result = overfit(model_config, train_config, log=_print_line)
    print(f"expected:  {result.expected}\ngenerated: {result.generated}")
    verdict = "learned by heart" if result.learned else f"NOT learned (the loss should fall below {OVERFIT_LOSS})"
    print(f"{verdict}: loss {result.loss:.4f} after {result.steps} steps, {result.seconds:.1f} s")
    return 0 if result.learned else 1


_print_line = functools.partial(print, flush=True)


# ----------------------------------------------------------------------------------------------------------- generate


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text with a trained model",
        description="Continue a text. It goes to stdout as it comes; a line about the speed goes to stderr.",
    )
    parser.set_defaults(command=_generate)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a run directory, its checkpoint.pt, or a Hugging Face directory"
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text to continue; empty: begin a new document (default: stdin, less one final newline)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to add (default: what fits)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens only (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="draw among the likeliest that reach this probability (default: all)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")
    parser.add_argument(
        "--no-cache", action="store_true", help="recompute the whole sequence for every token: the slow way"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the step: the first token takes seconds, the others half the time",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, mps … (default: %(default)s)")


def _generate(args: argparse.Namespace) -> int:
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise ValueError(
            "--top-k and --top-p have no effect at --temperature 0, which always takes the likeliest token"
        )
    if args.compile and args.no_cache:
        raise ValueError("--compile compiles the step on the cache, and --no-cache has none: drop one of them")
    import torch

    from diymodel.devices import choose_device

    device = choose_device(args.device)
    model, tokenizer = _load(Path(args.checkpoint))
    model.to(device)
    prompt = _prompt(args)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]  # after it, a document begins
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"the prompt has {len(ids)} tokens: no room for another in max_seq_len={model.config.max_seq_len}"
        )

    stream = tokenizer.stream()
    text, num_new = prompt, 0  # not printed yet: generate() may still refuse its arguments

    def show(new: torch.Tensor) -> None:
        nonlocal text, num_new
        print(text + stream.feed(int(new)), end="", flush=True)
        text, num_new = "", num_new + 1

    started = time.perf_counter()
    model.generate(
        torch.tensor([ids], device=device),
        room if args.max_new_tokens is None else args.max_new_tokens,
        use_cache=not args.no_cache,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        eos_token_id=tokenizer.eos_id if tokenizer.eos_id < model.config.vocab_size else None,
        seed=args.seed,
        on_token=show,
        compile=args.compile,
    )
    seconds = time.perf_counter() - started
    print(text + stream.flush(), flush=True)
    print(f"{num_new} tokens in {seconds:.2f} s, {num_new / seconds:.1f} tokens/s, seed {args.seed}", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    if sys.stdin.isatty():
        raise ValueError("no PROMPT: give one as an argument or on stdin")
    return sys.stdin.read().removesuffix("\n")


def _load(path: Path) -> tuple[DIYForCausalLM, Tokenizer]:
    """Model and tokenizer of a run directory, a checkpoint file or a Hugging Face directory."""
    from diymodel.checkpoint import load_pretrained, read_checkpoint
    from diymodel.tokenizer import JsonTokenizer, tokenizer_from_dict
    from diymodel.train import CHECKPOINT_NAME

    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: expected a directory that `diymodel train` wrote, its {CHECKPOINT_NAME}, or a "
            "Hugging Face directory"
        )
    if path.is_dir() and not (path / CHECKPOINT_NAME).exists():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has neither {CHECKPOINT_NAME} nor config.json")
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(f"{path} has no tokenizer.json, which turns the prompt into tokens")
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer = JsonTokenizer(text, _eos_token(path), add_special_tokens=True)
        return load_pretrained(path), tokenizer
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    checkpoint = read_checkpoint(path)
    if not checkpoint.training or "tokenizer" not in checkpoint.training:
        raise ValueError(f"{path} has no tokenizer in it: `diymodel train` did not write it")
    return checkpoint.model(), tokenizer_from_dict(checkpoint.training["tokenizer"])


def _eos_token(directory: Path) -> str | None:
    """The end token's name in a Hugging Face directory's ``tokenizer_config.json``, if it says one.

    Raises:
        ValueError: the file is not as Hugging Face's libraries write it.
    """
    from diymodel.hf_form import parse_json

    path = directory / "tokenizer_config.json"
    try:
        token = parse_json(path.read_bytes(), str(path)).get("eos_token")
    except FileNotFoundError:
        return None
    name = token.get("content") if isinstance(token, dict) else token
    if not (isinstance(name, str) or token is None):
        raise ValueError(f'{path}: eos_token is {json.dumps(token)}, and must be a text or {{"content": a text}}')
    return name
