"""No position sees a later one; every position sees itself, its past, and the order of its past."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.properties.compare import ROUNDING, assert_differs, assert_same, require


def prefix_unchanged_by_later_edit(
    model: nn.Module, input_ids: Tensor, cut: int, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """Other tokens from ``cut`` on change no logit before ``cut``, and do change those from ``cut`` on."""
    edited = torch.cat((input_ids[:, :cut], other_ids[:, cut:]), dim=1)
    before, after = model(input_ids), model(edited)
    assert_same(after[:, :cut], before[:, :cut], f"logits before an edit at position {cut}", tolerance)
    assert_differs(after[:, cut:], before[:, cut:], f"logits from an edit at position {cut} on", tolerance)


def prefix_unchanged_by_truncation(model: nn.Module, input_ids: Tensor, cut: int, tolerance: float = ROUNDING) -> None:
    """The first ``cut`` tokens alone give the first ``cut`` logits of the whole."""
    whole, truncated = model(input_ids)[:, :cut], model(input_ids[:, :cut])
    assert_same(truncated, whole, f"logits after truncation to {cut} tokens", tolerance)


def prefix_unchanged_by_later_edit_through_cache(
    model: nn.Module, input_ids: Tensor, start: int, cut: int, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """The same inside a chunk that continues a cache of ``start`` tokens."""
    _, past = model(input_ids[:, :start], use_cache=True)
    edited = torch.cat((input_ids[:, start:cut], other_ids[:, cut:]), dim=1)
    before = model(input_ids[:, start:], past_key_values=past)[:, : cut - start]
    after = model(edited, past_key_values=past)[:, : cut - start]
    assert_same(after, before, f"logits of a chunk from {start}, before an edit at position {cut}", tolerance)


def prefix_unchanged_by_later_edit_in_training(
    model: nn.Module, input_ids: Tensor, cut: int, other_ids: Tensor, seed: int, tolerance: float = ROUNDING
) -> None:
    """The same in training mode: with equal seeds, dropout drops the same elements in both calls."""
    model.train()
    edited = torch.cat((input_ids[:, :cut], other_ids[:, cut:]), dim=1)
    logits = []
    with torch.random.fork_rng():
        for ids in (input_ids, edited):
            torch.manual_seed(seed)
            logits.append(model(ids)[:, :cut])
    assert_same(logits[1], logits[0], f"training logits before an edit at position {cut}", tolerance)


def no_gradient_from_later_tokens(model: nn.Module, embedding: nn.Module, input_ids: Tensor, cut: int) -> None:
    """The logits before ``cut`` have exactly no gradient on the embeddings from ``cut`` on, and some before."""
    embedded: list[Tensor] = []

    def catch(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = embedding.register_forward_hook(catch)
    try:
        logits = model(input_ids)
    finally:
        handle.remove()
    # Random weights for the sum: a plain one could cancel.
    probe = torch.randn(logits[:, :cut].shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits[:, :cut] * probe).sum(), embedded)
    sizes = gradient.abs().amax(dim=(0, 2)).tolist()
    later = [position for position in range(cut, len(sizes)) if sizes[position] != 0]
    require(not later, f"gradient of the logits before {cut}: expected 0 from {cut} on, seen it at positions {later}")
    require(all(sizes[:cut]), f"gradient of the logits before {cut}: expected it at all earlier positions, got {sizes}")


def position_sees_itself(
    model: nn.Module, input_ids: Tensor, position: int, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """Another token changes the logits at its own position."""
    edited = input_ids.clone()
    edited[:, position] = other_ids[:, position]
    for row, (after, before) in enumerate(zip(model(edited), model(input_ids), strict=True)):
        assert_differs(after[position], before[position], f"row {row}: own logits of position {position}", tolerance)


def last_position_sees_the_first(
    model: nn.Module, input_ids: Tensor, other_ids: Tensor, tolerance: float = ROUNDING
) -> None:
    """Another first token changes every row's last logits."""
    edited = torch.cat((other_ids[:, :1], input_ids[:, 1:]), dim=1)
    for row, (after, before) in enumerate(zip(model(edited), model(input_ids), strict=True)):
        assert_differs(after[-1], before[-1], f"row {row}: last logits after an edit at position 0", tolerance)


def order_of_the_past_matters(model: nn.Module, input_ids: Tensor, tolerance: float = ROUNDING) -> None:
    """Exchanging the first two tokens, which differ, changes the last logits: one layer must know positions."""
    exchanged = torch.cat((input_ids[:, [1, 0]], input_ids[:, 2:]), dim=1)
    for row, (after, before) in enumerate(zip(model(exchanged), model(input_ids), strict=True)):
        assert_differs(after[-1], before[-1], f"row {row}: last logits after exchanging tokens 0 and 1", tolerance)
