"""Finds a module's own loss, by trying: where it is left, and how it wants its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.calling.loss_of_ids import find_loss_of_ids
from diymodel.verify.calling.signature import LABELS_SHIFTED, has_no, required_parameters
from diymodel.verify.calling.uncallable import wrong_logits
from diymodel.verify.convention import IGNORED, Convention
from diymodel.verify.failure import SubjectError, refusal, said
from diymodel.verify.learning import gradients_to

_SCALARS = 4  # that forward may return: a loss and what it is made of
_ROUNDING = 1e-5  # of the loss, or of its gradient: a difference that float32 may make
_SAME = 1e-2  # of a term: how far it may seem to differ for other labels


def find_loss(
    module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor, declared: Mapping[str, Any]
) -> tuple[Convention, dict[str, str]]:
    """Whether there is a loss, where it is left and, where the name leaves it open, how it wants its labels."""
    if convention.loss is not None:
        return convention, {}
    if convention.loss_switch:
        return find_loss_of_ids(module, config, convention)
    if not convention.labels:
        return convention, {"loss": has_no(module, "labels")}
    styles = [convention]
    if not {"labels_come_shifted", "ignore_index"} & declared.keys():
        pairs = _label_styles(LM(module, config, convention), ids)
        styles = [replace(convention, labels_come_shifted=s, ignore_index=i) for s, i in pairs]
    candidates = [way for style in styles for way in _losses(LM(module, config, style), ids)]
    accepted: list[Convention] = []
    reasons: list[str] = []
    for candidate in candidates:
        lm = LM(module, config, candidate)
        try:
            lm.loss(ids, _half_ignored(ids))
        except SubjectError as error:
            reasons.insert(0, f"{error}, and left none in an attribute")  # it came further than one that raised
        except Exception as error:  # a stranger's forward may raise anything
            reasons.append(f"forward({convention.labels}=…) gave no loss: {said(error)}")
        else:
            if _is_cross_entropy(lm, ids, _half_ignored(ids)):
                return replace(candidate, loss_holds_term=_holds_term(lm, ids)), {}
            accepted.append(candidate)
    for way in accepted:
        if _holds_term(LM(module, config, way), ids):
            return replace(way, loss_holds_term=True), {}
    if accepted:  # there is a loss, of no known kind: the checks will say how it is wrong
        return accepted[0], {}
    if (dense := _of_tokens_alone(module, config, convention, ids)) is not None:
        return dense, {"labels": f"no label can be ignored: {reasons[0]}"}
    advice = "let it return (logits, loss), or write Subject(…, loss=lambda logits, labels: …)"
    return convention, {"loss": f"{reasons[0]}; {advice}"}


def _of_tokens_alone(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> Convention | None:
    """How a loss is had that takes each label for a token; where it is no cross-entropy, the checks will say so."""
    shifted = convention.labels in LABELS_SHIFTED
    ways = [replace(convention, labels_come_shifted=s, labels_are_tokens=True) for s in (shifted, not shifted)]
    taken = [way for way in ways if refusal(LM(module, config, way).loss, ids, ids.clone()) is None]
    return min(taken, key=lambda way: not _is_cross_entropy(LM(module, config, way), ids, ids), default=None)


def _label_styles(lm: LM, ids: Tensor) -> tuple[tuple[bool, int], ...]:
    """Whether labels may come shifted, and what may be ignored, in the order to try them in."""
    if lm.convention.labels in LABELS_SHIFTED:
        return (True, -1), (True, IGNORED), (False, IGNORED), (False, -1)
    try:
        lm.loss(ids, _half_ignored(ids))
    except IndexError:  # what is to be ignored was taken for a token
        return (False, -1), (True, -1)
    except Exception:  # a stranger's forward may raise anything; who tries it next tells what
        pass
    return ((lm.convention.labels_come_shifted, lm.convention.ignore_index),)


def _losses(lm: LM, ids: Tensor) -> list[Convention]:
    """How the loss may be had: as forward returns it, or from attributes where it leaves it.

    Such an attribute holds a scalar with a graph, and another one for other labels; an auxiliary loss does not.
    """
    if lm.convention.loss_attribute is not None:
        return [lm.convention]
    if refusal(lm.loss, ids, _half_ignored(ids)) is None:
        return [replace(lm.convention, loss_place=place) for place in range(_SCALARS) if _is_new(lm, ids, place)]
    left = []
    for labels in (ids, ids.roll(1, 1)):
        with torch.enable_grad():
            refusal(lm.loss, ids, labels)
        left.append(_scalars(lm.module))
    first, second = left
    paths = [path for path in first.keys() & second.keys() if not torch.equal(first[path], second[path])]
    return [replace(lm.convention, loss_attribute=path) for path in sorted(paths)] or [lm.convention]


def _is_new(lm: LM, ids: Tensor, place: int) -> bool:
    """Whether there is a scalar at a place, and not at the one before it already."""
    if place == 0:
        return True
    ways = (replace(lm.convention, loss_place=at) for at in (place - 1, place))
    before, found = (LM(lm.module, lm.config, way).loss(ids, ids) for way in ways)
    return not torch.equal(before, found)


def _scalars(module: nn.Module) -> dict[str, Tensor]:
    """The attributes that hold a scalar with a graph, by their path."""
    return {
        f"{name}.{attribute}" if name else attribute: value.detach()
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        if isinstance(value, Tensor) and value.dim() == 0 and value.grad_fn is not None
    }


def no_labelled_logits(module: nn.Module, config: DIYConfig, convention: Convention, ids: Tensor) -> str | None:
    """Why a call with labels gives no logits of every token; None: it does."""
    name = convention.labels
    if name is None or convention.always_cached:
        return has_no(module, "labels") if name is None else "every call is on a cache"
    if name in required_parameters(module):
        return f"no call goes without {name}"
    error = wrong_logits(LM(module, config, replace(convention, logits_need_labels=True)), ids)
    return None if error is None else f"with {name} {said(error)}"


def _half_ignored(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, ::2] = IGNORED
    return labels


def _is_cross_entropy(lm: LM, ids: Tensor, labels: Tensor) -> bool:
    return abs(float(lm.beside_cross_entropy(ids, labels))) <= 1e-4 * float(lm.loss(ids, labels).abs())


def _holds_term(lm: LM, ids: Tensor) -> bool:
    """Whether the loss is the cross-entropy and a term that has a gradient, and that labels do not change.

    A constant has none, and is a mistake.
    """
    labels = (ids + 1) % lm.config.vocab_size
    label_sets = _half_ignored(ids), labels, _half_ignored(labels.flip(0)).roll(1, 1)
    parameters = [p for p in lm.module.parameters() if p.requires_grad]
    try:
        terms = torch.stack([lm.beside_cross_entropy(ids, some) for some in label_sets])
        size, loss = float(terms.abs().min()), float(lm.loss(ids, labels).abs())
        if not size > _ROUNDING * loss or float(terms.max() - terms.min()) > _SAME * size:
            return False
        with torch.enable_grad():
            of_term = _largest_gradient(lm.beside_cross_entropy(ids, labels), parameters)
            return of_term > _ROUNDING * _largest_gradient(lm.loss(ids, labels), parameters)
    except Exception:  # a stranger's forward and backward may raise anything
        return False


def _largest_gradient(objective: Tensor, parameters: Sequence[Tensor]) -> float:
    return max((float(g.abs().max()) for g in gradients_to(objective, parameters) if g is not None), default=0.0)
