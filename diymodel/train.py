"""The training loop: the three lines of :mod:`diymodel.overfit`, with everything that a real run needs.

A run directory holds ``checkpoint.pt`` (weights, configuration and everything needed to continue), ``metrics.jsonl``
(a line for every step and every evaluation) and, once finished, ``loss.svg``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diymodel._compat import FUSED_DEVICES
from diymodel._run import CtrlC, Log, Metrics, Progress
from diymodel.checkpoint import read_checkpoint, save_checkpoint
from diymodel.config import DIYConfig, TrainConfig
from diymodel.data import Batch, Rows, fingerprint, split_documents
from diymodel.devices import choose_autocast, choose_device, device_of
from diymodel.generate import eval_mode
from diymodel.loss import next_token_loss, num_scored
from diymodel.model import DIYForCausalLM
from diymodel.tokenizer import ByteTokenizer, Tokenizer

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
CURVE_NAME = "loss.svg"


# ----------------------------------------------------------------------------------------------- the parts of a step


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0: a straight rise, then half a cosine down.

    It is highest at step ``warmup_steps``, and ``min_lr_ratio`` times that at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    way = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * way)) / 2
    return config.learning_rate * share


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices; the norms' weights, which are scales, are left alone.

    The fused kernel, one pass over memory instead of several, takes a third of the time; not every device has one.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=device_of(model).type in FUSED_DEVICES,
    )


class StepResult(NamedTuple):
    """What one optimizer step saw."""

    loss: float  # mean over the step's scored tokens, in nats, before the update
    grad_norm: float  # before clipping
    num_tokens: int  # scored


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    grad_clip: float,
    autocast_dtype: torch.dtype | None = None,
) -> StepResult:
    """One optimizer step over one or more micro-batches, as if they were one large batch.

    Each micro-batch's summed loss is divided by the number of scored tokens in *all* of them. The mean of their means
    would give a token in a micro-batch with much padding more weight than one in a full micro-batch.

    Args:
        model: in training mode.
        optimizer: holds the model's parameters.
        batches: micro-batches, on any device.
        grad_clip: the whole gradient is scaled down to this norm when it is longer.
        autocast_dtype: matrix products are computed in this type. None: in the weights' own.
    """
    device = device_of(model)
    num_tokens = sum(int(num_scored(batch.labels)) for batch in batches)
    total = torch.zeros((), device=device)
    optimizer.zero_grad()  # backward adds to the gradients that are there
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            logits = model(batch.input_ids, seq_lengths=batch.seq_lengths)
        loss = next_token_loss(logits, batch.labels, reduction="sum") / max(1, num_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return StepResult(float(total), float(grad_norm), num_tokens)


class Evaluation(NamedTuple):
    """How well a model predicts a text."""

    loss: float  # nats per token, end-of-document tokens included
    bits_per_byte: float  # all of these nats, as bits, over the bytes of the text: comparable between tokenizers


def evaluate(model: DIYForCausalLM, rows: Rows, batch_size: int = 16, max_batches: int = 2**31) -> Evaluation:
    """Score a model on rows of text, in eval mode and in the weights' own precision, as generation runs.

    Args:
        model: afterwards every module is back in its own mode.
        rows: the text.
        batch_size: rows at a time.
        max_batches: most batches; what they leave out is taken to be like what they hold.
    """
    device = device_of(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = 0
    with eval_mode(model), torch.inference_mode():
        for batch in rows.in_order(batch_size, max_batches):
            num_tokens += int(num_scored(batch.labels))
            batch = batch.to(device)
            logits = model(batch.input_ids, seq_lengths=batch.seq_lengths)
            total += next_token_loss(logits, batch.labels, reduction="sum")
    loss = float(total) / num_tokens
    return Evaluation(loss, loss / math.log(2) * rows.num_scored / rows.num_bytes)


# ------------------------------------------------------------------------------------------------------- a whole run


class TrainResult(NamedTuple):
    """How :func:`train` ended."""

    model: DIYForCausalLM  # in training mode, on the training device
    step: int  # optimizer steps done
    interrupted: bool  # stopped by Ctrl-C before the last step
    evaluation: Evaluation | None  # on the held-out text after the last step; None when interrupted
    checkpoint: Path


def train(
    model_config: DIYConfig,
    train_config: TrainConfig,
    documents: Sequence[str],
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Train a new model on documents, or continue a run, and leave everything in the directory ``out``.

    A resumed run goes on as if it had never stopped: on a CPU with the same number of threads, every later loss and
    the final weights are equal bit for bit. On a GPU they are as equal as two runs of its kernels are.

    Ctrl-C finishes the step, saves and returns; a second one raises ``KeyboardInterrupt`` at once. (The signal handler
    is set only in the main thread, and the earlier one is put back.) The global torch random state is seeded and used.

    Args:
        model_config: the architecture; its vocabulary must hold the tokenizer's.
        train_config: how to train.
        documents: the texts. About a tenth is held out for evaluation (:func:`diymodel.data.split_documents`).
        out: the run directory; created if need be.
        tokenizer: default: :class:`diymodel.data.ByteTokenizer`. It is stored in the checkpoint.
        resume: continue from the checkpoint in ``out``. Documents, tokenizer and configurations must be those of its
            beginning; only how often it logs, evaluates and saves may differ.
        log: called with each progress line.

    Raises:
        FileExistsError: ``out`` has a checkpoint, and ``resume`` is not asked for.
        FileNotFoundError: ``resume`` is asked for, and ``out`` has no checkpoint.
        ValueError: settings, data or device do not fit each other, or not the run to resume (both values are given).
        FloatingPointError: the loss or the gradient is no longer finite; the checkpoint is from before.
        KeyboardInterrupt: a second Ctrl-C.
    """
    out = Path(out)
    path = out / CHECKPOINT_NAME
    tokenizer = tokenizer or ByteTokenizer()
    tokenizer.check_fits(model_config.vocab_size)
    device = choose_device(train_config.device)
    autocast_dtype = choose_autocast(train_config.dtype, model_config.hidden_size, device)
    training_text, held_out_text = split_documents(documents)
    rows = Rows(training_text, tokenizer, model_config.max_seq_len, train_config.batching)
    held_out = Rows(held_out_text, tokenizer, model_config.max_seq_len, train_config.batching)
    identity = _identity(model_config, train_config, device, autocast_dtype, tokenizer, documents)

    torch.manual_seed(train_config.seed)
    model = DIYForCausalLM(model_config).to(device).train()
    optimizer = make_optimizer(model, train_config)
    first_step = _restore(path, model, optimizer, identity) if resume else _begin(path)
    metrics = Metrics(out / METRICS_NAME, first_step)

    def save(steps_done: int) -> None:
        state = {
            "step": steps_done,
            "optimizer": optimizer.state_dict(),
            "rng": _rng_state(device),
            "train_config": train_config.to_dict(),
            "tokenizer": tokenizer.to_dict(),
            "identity": identity,
        }
        save_checkpoint(path, model, training=state)

    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    log(
        f"{num_parameters:,} parameters; {rows.num_bytes:,} bytes to train on in {len(rows):,} rows, "
        f"{held_out.num_bytes:,} held out; {_describe(device)}, {'bfloat16' if autocast_dtype else 'float32'}"
    )
    if first_step:
        log(f"resumed from {path} at step {first_step}")

    steps, accumulation = train_config.steps, train_config.grad_accumulation
    progress = Progress(first_step, steps, log)
    evaluation = None
    done = first_step
    with CtrlC() as ctrl_c:
        while done < steps:
            learning_rate = learning_rate_at(done, train_config)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            batches = [rows.micro_batch(done * accumulation + i, train_config) for i in range(accumulation)]
            result = train_step(model, optimizer, batches, train_config.grad_clip, autocast_dtype)
            done += 1
            if not math.isfinite(result.loss + result.grad_norm):
                raise FloatingPointError(
                    f"loss {result.loss} with gradient norm {result.grad_norm} at step {done}: training has diverged; "
                    f"try a learning_rate below {train_config.learning_rate}"
                )
            metrics.write(step=done, learning_rate=learning_rate, **result._asdict())
            progress.add(result.loss, result.num_tokens, learning_rate)
            if done % train_config.log_every == 0 or done == steps:
                progress.report()
            if done % train_config.eval_every == 0 or done == steps:
                evaluation = evaluate(model, held_out, train_config.batch_size, train_config.eval_batches)
                metrics.write(step=done, held_out_loss=evaluation.loss, bits_per_byte=evaluation.bits_per_byte)
                log(
                    f"step {done}/{steps}  held out: {evaluation.loss:.3f} nats/token, "
                    f"{evaluation.bits_per_byte:.3f} bits/byte"
                )
            stop = ctrl_c.pressed  # read once: a later press must not stop before the next save
            if done % train_config.save_every == 0 or done == steps or stop:
                save(done)
            if stop:
                break
    if done < steps:
        log(f"stopped at step {done}/{steps}; saved in {path}; continue with --resume")
        return TrainResult(model, done, True, None, path)
    if first_step == steps:
        evaluation = evaluate(model, held_out, train_config.batch_size, train_config.eval_batches)
    _draw_curve(out, log)
    log(f"done: {path}")
    return TrainResult(model, done, False, evaluation, path)


def _describe(device: torch.device) -> str:
    return f"cpu with {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _draw_curve(out: Path, log: Log) -> None:
    from diymodel.plot import draw_loss  # matplotlib is optional, and slow to import

    try:
        draw_loss(out / METRICS_NAME, out / CURVE_NAME)
    except ImportError:
        log("no loss curve, for want of matplotlib: pip install 'diymodel[plot]'")


# ------------------------------------------------------------------------------------------------- begin and continue

# Settings that do not change where the run goes; "auto" in device and dtype is compared by what it stands for.
_FREE = {"eval_every", "eval_batches", "save_every", "log_every", "device", "dtype"}


def _identity(
    model_config: DIYConfig,
    train_config: TrainConfig,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
    tokenizer: Tokenizer,
    documents: Sequence[str],
) -> dict[str, Any]:
    """Everything that decides where a run goes, by the name that an error message gives it."""
    settings = {f"DIYConfig.{name}": value for name, value in model_config.to_dict().items()}
    settings |= {f"TrainConfig.{name}": value for name, value in train_config.to_dict().items() if name not in _FREE}
    return settings | {
        "device": device.type,
        "dtype": "bfloat16" if autocast_dtype else "float32",
        "tokenizer": fingerprint([json.dumps(tokenizer.to_dict())]),
        "data": f"{len(documents)} documents, {sum(map(len, documents)):,} characters, hash {fingerprint(documents)}",
    }


def _begin(path: Path) -> int:
    if path.exists():
        raise FileExistsError(
            f"{path} is there already: continue that run with resume (--resume), or choose another place"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return 0


def _restore(path: Path, model: DIYForCausalLM, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]) -> int:
    """Put a checkpoint's state into model, optimizer and random generators; returns how many steps are done."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    checkpoint = read_checkpoint(path)
    state = checkpoint.training
    if not state or "identity" not in state:
        raise ValueError(f"{path} holds a model, but no training run to resume")
    for name, now in identity.items():
        before = state["identity"].get(name)
        if before != now:
            raise ValueError(f"cannot resume {path}: {name} was {before!r} and is {now!r} now")
    model.load_state_dict(checkpoint.state_dict)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device_of(model))
    step: int = state["step"]
    return step


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """The generators that dropout draws from. The order of the data needs none: it follows from seed and step."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state
