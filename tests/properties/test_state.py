"""The properties of ``state.py`` on our model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diymodel import DIYConfig, DIYForCausalLM
from tests.oracles import oracle_num_parameters
from tests.properties import state
from tests.properties.strategies import Case, cases, configs

TIED = ("model.embed_tokens.weight", "lm_head.weight")


@given(case=cases())
def test_round_trip_is_exact(case: Case) -> None:
    fresh = replace(case, seed=case.seed + 1).model()
    state.round_trip_is_exact(case.model(), fresh, case.input_ids)


@given(case=cases(), data=st.data())
def test_load_is_strict(case: Case, data: st.DataObject) -> None:
    model = case.model()
    state.load_is_strict(model, data.draw(st.sampled_from([name for name, _ in model.named_parameters()]), "name"))


def load(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return model


def load_by_assignment(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def via_meta(model: nn.Module) -> nn.Module:
    """As large models are built: without memory first, then with memory, then with weights."""
    with torch.device("meta"):
        empty = DIYForCausalLM(model.config).to(model.lm_head.weight.dtype).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    return empty


@pytest.mark.parametrize(
    "operation",
    [
        load,
        load_by_assignment,
        via_meta,
        copy.deepcopy,
        nn.Module.double,
        nn.Module.bfloat16,
        lambda model: model.to("cpu", torch.float32),
        lambda model: model.to("meta").to_empty(device="cpu"),
    ],
    ids=["load", "assign", "via_meta", "deepcopy", "double", "bfloat16", "to", "to_empty"],
)
@given(case=cases(tied=True))
def test_tie_survives(operation: state.Operation, case: Case) -> None:
    state.tie_survives(case.model(), TIED, operation)


@given(case=cases())
def test_meta_round_trip_is_exact(case: Case) -> None:
    state.round_trip_is_exact(case.model(), via_meta(replace(case, seed=case.seed + 1).model()), case.input_ids)


@given(case=cases(tied=True))
def test_untied_head_is_refused(case: Case) -> None:
    state.untied_head_is_refused(case.model(), TIED)


@given(config=configs())
def test_number_of_parameters(config: DIYConfig) -> None:
    state.number_of_parameters_is(DIYForCausalLM(config), oracle_num_parameters(config))


@given(config=configs())
def test_depth_adds_parameters(config: DIYConfig) -> None:
    state.depth_adds_parameters(lambda layers: DIYForCausalLM(replace(config, num_layers=layers)), config.num_layers)


@given(case=cases())
def test_deepcopy_is_independent(case: Case) -> None:
    state.deepcopy_is_independent(case.model(), case.input_ids)
