"""``train()`` and ``eval()`` switch dropout, everywhere, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.properties.compare import ROUNDING, assert_identical, assert_refused, assert_same, require

_CALLS = 24  # a tiny model may well drop the same few elements twice in a row, but not in all these calls


def dropout_is_on_in_training(model: nn.Module, input_ids: Tensor, seed: int) -> None:
    """With dropout above 0, calls in training mode differ from each other."""
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = model(input_ids)
        differ = any(not torch.equal(model(input_ids), first) for _ in range(_CALLS))
    require(
        differ, f"{_CALLS} further calls in training mode with dropout: expected other logits, seen the same each time"
    )


def dropout_is_off_in_eval(model: nn.Module, without_dropout: nn.Module, input_ids: Tensor) -> None:
    """After ``eval()`` the model computes what its twin without dropout computes, each time."""
    model.train()
    model(input_ids)
    model.eval()
    expected = without_dropout.eval()(input_ids)
    for call in range(3):
        assert_identical(model(input_ids), expected, f"logits in eval mode, call {call}")


def modes_agree_without_dropout(model: nn.Module, input_ids: Tensor, tolerance: float = ROUNDING) -> None:
    """With dropout 0, training mode computes what eval mode computes."""
    evaluated = model.eval()(input_ids)
    assert_same(model.train()(input_ids), evaluated, "training logits without dropout", tolerance)


def mode_reaches_every_submodule(model: nn.Module) -> None:
    """``train()`` and ``eval()`` set ``training`` on every part."""
    for mode in (True, False, True):
        model.train(mode)
        wrong = [name for name, module in model.named_modules() if module.training is not mode]
        require(not wrong, f"after train({mode}): expected all submodules in this mode, seen in the other: {wrong}")


def cache_is_refused_in_training(model: nn.Module, input_ids: Tensor) -> None:
    """Asking for a cache, or giving one, in training mode is an error that says what to do."""
    _, past = model.eval()(input_ids[:, :1], use_cache=True)
    model.train()
    advice = "call model.eval() first"
    assert_refused(lambda: model(input_ids, use_cache=True), advice, "use_cache=True in training mode")
    assert_refused(lambda: model(input_ids[:, :1], past_key_values=past), advice, "a given cache in training mode")
