"""The properties of ``gradients.py`` on our model.

Tokens differ within a row: where all are equal, attention averages equal values and queries have no gradient. Three
tokens at least: the first position attends to itself alone and the last is not scored.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diymodel import next_token_loss
from tests.properties import gradients
from tests.properties.strategies import SEEDS, Case, cases

CASES = cases(min_length=3, distinct=True, max_sharpness=1)
UNTIED = cases(min_length=3, distinct=True, max_sharpness=1, tied=False)


def objective(case: Case) -> gradients.Objective:
    def loss(model: nn.Module) -> Tensor:
        return next_token_loss(model(case.input_ids), case.input_ids)

    return loss


@given(case=CASES, training=st.booleans())
def test_every_parameter_gets_a_gradient(case: Case, training: bool) -> None:
    training = training and case.config.dropout == 0  # dropout may take all of a tiny model's few activations
    gradients.every_parameter_gets_a_gradient(case.model().train(training), objective(case))


@given(case=UNTIED)
def test_absent_tokens_get_no_gradient(case: Case) -> None:
    model = case.model()
    embedding = model.model.embed_tokens.weight
    gradients.absent_tokens_get_no_gradient(model, objective(case), embedding, case.input_ids)


@given(case=CASES)
def test_small_step_lowers_the_loss(case: Case) -> None:
    gradients.small_step_lowers_the_loss(case.model(), objective(case))


@given(case=CASES, seed=SEEDS)
def test_gradient_equals_finite_differences(case: Case, seed: int) -> None:
    gradients.gradient_equals_finite_differences(case.model(), objective(case), seed)
