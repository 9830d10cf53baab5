"""Experts that take so many tokens of a batch only: one token takes another's place, and no gradient says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify import check_causal_lm
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


class DropsOut(nn.Module):
    """Each expert drops out of the tokens that it is sent, so that where one goes decides on the dropout of others."""

    def __init__(self, config: Any, leaks: bool = False) -> None:
        super().__init__()
        d, self.leaks = config.hidden_size, leaks
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.gate, self.experts = nn.Linear(d, EXPERTS), nn.ModuleList(nn.Linear(d, d) for _ in range(EXPERTS))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).cumsum(1)
        if self.leaks and self.training and self.dropout.p:
            x = x.flip(1)
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = self.dropout(expert(x[chosen == i]))
        logits: Tensor = self.head(x + weights[..., None] * out)
        return logits


@pytest.mark.parametrize(("leaks", "status"), [(False, "passed"), (True, "failed")])
def test_other_dropout_where_a_token_goes_to_another_expert_is_no_leak(leaks: bool, status: str) -> None:
    report = check_causal_lm(lambda config: DropsOut(config, leaks), profile="quick", only=("causality.in_training",))
    assert [result.status for result in report.results] == [status], report.to_text()
