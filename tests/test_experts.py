"""Experts that take so many tokens of a batch only: one token takes another's place, and no gradient says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify.experiments.parts import PARTS
from diymodel.verify.registry import list_checks
from diymodel.verify.report import Failure, Result
from diymodel.verify.subject import Subject
from diymodel.verify.symptoms import Patient, list_symptoms

EXPERTS = 4
Keep = Callable[[Tensor, bool], Tensor]  # of experts that are chosen (tokens, experts) and the mode: which take place


class Routed(nn.Module):
    """A running mean, and one expert for each token, chosen by ``argmax``."""

    def __init__(self, config: Any, keep: Keep, smooth: bool = False) -> None:
        super().__init__()
        d, self.keep, self.smooth = config.hidden_size, keep, smooth
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.gate, self.experts = nn.Linear(d, EXPERTS), nn.Parameter(torch.randn(EXPERTS, d, d))

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        x = (self.embed(input_ids).cumsum(1) / places[:, None]).flatten(0, 1)
        weights = self.gate(x - x.mean(0) if self.smooth else x).softmax(-1)
        chosen = nn.functional.one_hot(weights.argmax(-1), EXPERTS)
        kept = weights * chosen * self.keep(chosen, self.training)
        logits: Tensor = self.head(x + torch.einsum("tc,ecd,te->td", x, self.experts, kept))
        return logits.unflatten(0, input_ids.shape)


def all_of(chosen: Tensor, training: bool) -> Tensor:
    return torch.ones_like(chosen)


def first_come(chosen: Tensor, training: bool) -> Tensor:
    return chosen.cumsum(0) <= max(1, len(chosen) // EXPERTS)


def first_come_in_training(chosen: Tensor, training: bool) -> Tensor:
    return first_come(chosen, training) if training else all_of(chosen, training)


def last_come(chosen: Tensor, training: bool) -> Tensor:
    return first_come(chosen.flip(0), training).flip(0)


@pytest.mark.parametrize(
    ("keep", "smooth", "answer"),
    [
        (first_come, False, True),
        (first_come_in_training, False, True),
        (last_come, False, True),
        (all_of, False, False),
        (all_of, True, False),
    ],
)
def test_whether_tokens_take_the_place_of_others(keep: Keep, smooth: bool, answer: bool) -> None:
    subject = Subject(lambda config: Routed(config, keep, smooth))
    check = next(check for check in list_checks() if check.id == "batch.row_alone")
    patient = Patient(subject, {check.id: Result(check, "failed", failure=Failure("told", (), {}, {}, ""))})
    assert list_symptoms()["experts.take_the_place_of_others"].ask(patient) is answer
    assert PARTS["router"](patient)
