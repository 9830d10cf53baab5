"""The smallest training loop there is: one sequence, learned by heart."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from diymodel._run import Log
from diymodel.config import DIYConfig, TrainConfig
from diymodel.devices import choose_device
from diymodel.loss import next_token_loss
from diymodel.model import DIYForCausalLM
from diymodel.tokenizer import ByteTokenizer

OVERFIT_TEXT = "The cat sat on a mat"  # 20 bytes, so 20 tokens; after "at" only what came before tells what follows
OVERFIT_LOSS = 0.01


class OverfitResult(NamedTuple):
    """How :func:`overfit` ended."""

    loss: float  # of the last step, in nats per token
    steps: int
    seconds: float
    expected: str
    generated: str  # greedily, from the first token on

    @property
    def learned(self) -> bool:
        """Whether the loss got below ``OVERFIT_LOSS`` and the sequence came back."""
        return self.loss < OVERFIT_LOSS and self.generated == self.expected


def overfit(model_config: DIYConfig, train_config: TrainConfig, log: Log = print) -> OverfitResult:
    """Learn one sequence of 20 tokens by heart: the smallest proof that forward, loss and backward are right.

    Args:
        model_config: needs ``vocab_size`` of at least 258 and ``max_seq_len`` of at least 20.
        train_config: ``steps``, ``batch_size`` (copies of the sequence), ``learning_rate``, ``seed`` and ``device``
            are used. It stops early, once the loss is below ``OVERFIT_LOSS``.
        log: called with each progress line.

    Raises:
        ValueError: the model is too small for the sequence, or there is no such device.
    """
    tokenizer = ByteTokenizer()
    tokenizer.check_fits(model_config.vocab_size)
    device = choose_device(train_config.device)
    torch.manual_seed(train_config.seed)
    model = DIYForCausalLM(model_config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train_config.learning_rate)
    sequence = torch.tensor(tokenizer.encode(OVERFIT_TEXT), device=device)
    input_ids = sequence.repeat(train_config.batch_size, 1)
    labels = input_ids  # not shifted: next_token_loss shifts
    started = time.perf_counter()
    step, loss_value = 0, math.inf
    while step < train_config.steps and loss_value >= OVERFIT_LOSS:
        logits = model(input_ids)
        loss = next_token_loss(logits, labels)
        optimizer.zero_grad()  # backward adds to the gradients that are there
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step, loss_value = step + 1, loss.item()
        if step % train_config.log_every == 0 or loss_value < OVERFIT_LOSS:
            log(f"step {step:>4}/{train_config.steps}  loss {loss_value:.4f}")
    seconds = time.perf_counter() - started
    generated = model.generate(sequence[None, :1], max_new_tokens=len(sequence) - 1)
    return OverfitResult(loss_value, step, seconds, OVERFIT_TEXT, tokenizer.decode(generated[0].tolist()))
