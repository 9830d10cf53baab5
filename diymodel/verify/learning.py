"""What the checks of gradients, of learning and of training mode share.

Shapes: B batch, T sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel.verify.adapters import LM
from diymodel.verify.failure import CheckFailure, began, said
from diymodel.verify.trial import Trial

# A single ReLU may well be off at every token, and a LayerNorm over two features passes hardly any gradient on.
WIDE_ENOUGH = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 8}


def distinct_tokens(trial: Trial, lm: LM, min_length: int = 3, max_length: int = 6) -> Tensor:
    """One row without repetition (1, T): over equal tokens, attention averages equal values and has no gradient."""
    length = trial.draw("length", st.integers(min_length, max_length))
    row = st.permutations(range(lm.config.vocab_size)).map(lambda tokens: tokens[:length])
    return torch.tensor([trial.draw("tokens", row)], device=trial.device)


def trainable(lm: LM) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in lm.module.named_parameters() if p.requires_grad and p.numel()}


def next_token_loss(lm: LM, ids: Tensor) -> Tensor:
    """Cross-entropy from the logits, so that a subject without a loss has one."""
    return F.cross_entropy(lm.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(objective: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    """Of each parameter; None where the objective does not depend on it."""
    if not parameters:
        raise CheckFailure("the module must have parameters to train, saw none with requires_grad")
    if not objective.requires_grad:
        raise CheckFailure("the logits must carry a gradient, saw none: no parameter could learn")
    return dict(zip(parameters, gradients_to(objective, list(parameters.values())), strict=True))


def gradients_to(objective: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Of each leaf; None where the objective does not depend on it."""
    if not _is_checkpointed(objective):
        with _backward_runs():
            return list(torch.autograd.grad(objective, leaves, allow_unused=True))
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    backward(objective)
    found = [leaf.grad for leaf in leaves]
    for leaf, grad in zip(leaves, before, strict=True):
        leaf.grad = grad
    return found


def backward(objective: Tensor) -> None:
    """``objective.backward()``, which fails the check where the module's graph does not allow it."""
    with _backward_runs():
        objective.backward()  # type: ignore[no-untyped-call]


@contextmanager
def _backward_runs() -> Iterator[None]:
    """Torch's own words about the graph are the module's failure: no line of the module stands in their traceback."""
    try:
        yield
    except RuntimeError as error:
        if began(error):  # a backward written by hand, whose lines are told
            raise
        what = said(error).partition(". Hint: ")[0]  # of torch's, which the line that is told makes needless
        raise CheckFailure(f"the backward pass must run, saw {what}", causes=()) from error


def _is_checkpointed(objective: Tensor) -> bool:
    """Whether a reentrant checkpoint is in the graph, which knows no torch.autograd.grad, only backward."""
    seen, waiting = set(), [objective.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False


def accumulated(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What backward passes have left at each parameter."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}


def same_gradients(trial: Trial, seen: dict[str, Tensor], what: str, lm: LM, objective: Callable[[], Tensor]) -> None:
    """Fail unless ``seen`` are the gradients of ``objective()``, computed by ``lm``, up to its own rounding.

    Args:
        what: the property, as "…, the gradient must …"; the parameter is put behind it.
    """
    parameters = trainable(lm)

    def gradients_again() -> list[Tensor]:
        with torch.enable_grad():
            found = gradients_of(objective(), parameters)
        return [torch.zeros_like(parameters[name]) if g is None else g for name, g in found.items()]

    expected = gradients_again()
    scale = torch.stack([g.abs().max() for g in expected])
    for name, gradient in zip(parameters, expected, strict=True):
        trial.same(
            seen[name],
            gradient,
            f"{what} (of {name})",
            lm,
            lambda: torch.cat([g.flatten() for g in gradients_again()]),
            scale,
        )


@contextmanager
def training_undone(module: nn.Module) -> Iterator[None]:
    """What calls inside write to buffers and frozen parameters is undone, where it would be saved with the weights.

    In training some change by design: running statistics, or a bias that balances experts. Nothing else that a call
    leaves behind is undone, such as what it keeps on the module beside the weights.
    """
    undone: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # of each tensor one, wherever it is held
    for part in module.modules():
        holders: tuple[dict[str, Any], ...] = (part._buffers, part._parameters)
        for held in holders:
            for name, tensor in held.items():
                if tensor is None or tensor.requires_grad or name in part._non_persistent_buffers_set:
                    continue
                undone.append((held, name, tensor))
                copy = tensor.detach().clone()
                copies.setdefault(id(tensor), nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy)
    for held, name, tensor in undone:
        held[name] = copies[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in undone:
            held[name] = tensor


def trained_call(lm: LM, ids: Tensor) -> Tensor:
    """Logits of a call in training mode, which changes nothing that is saved."""
    with training_undone(lm.module):
        return lm.logits(ids)
