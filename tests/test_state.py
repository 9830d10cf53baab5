"""The state dict of our model: which misfits are refused in which words, and when a tied weight stays one weight.

That it is the whole model, and comes back bit for bit, is checked by the harness: tests/properties.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diymodel import DIYConfig, DIYForCausalLM
from diymodel.cost import num_parameters
from diymodel.verify.strategies import configs
from tests.strategies import Case, cases


@given(case=cases(), data=st.data())
def test_what_does_not_fit_is_refused_by_name(case: Case, data: st.DataObject) -> None:
    """A missing entry, one too many, and one of another shape; the weights stay as they were."""
    model = case.model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = data.draw(st.sampled_from([name for name, _ in model.named_parameters()]), "name")
    wrong = {
        f"missing: {name}": {key: tensor for key, tensor in state.items() if key != name},
        "unexpected: extra.weight": {**state, "extra.weight": torch.zeros(1)},
        f"shape: {name}": {**state, name: torch.cat((state[name], state[name][:1]))},
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=message):
            model.load_state_dict({key: tensor + 1 for key, tensor in other.items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@given(case=cases(tied=True))
def test_a_head_unlike_the_embedding_is_refused(case: Case) -> None:
    """Where the model ties the two."""
    model = case.model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        model.load_state_dict(state)


def load_by_assignment(model: DIYForCausalLM) -> nn.Module:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    return model


def via_meta(model: DIYForCausalLM) -> DIYForCausalLM:
    """As large models are built: without memory first, then with memory, then with weights."""
    with torch.device("meta"):
        empty = DIYForCausalLM(model.config).to(model.lm_head.weight.dtype).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    return empty


def through_meta(model: DIYForCausalLM) -> nn.Module:
    return model.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize(
    "operation",
    [
        load_by_assignment,
        via_meta,
        nn.Module.bfloat16,
        lambda model: model.to("cpu", torch.float32),
        through_meta,
    ],
    ids=["assign", "via_meta", "bfloat16", "to", "through_meta"],
)
@given(case=cases(tied=True))
def test_a_tied_weight_stays_one_parameter(operation: Callable[[DIYForCausalLM], nn.Module], case: Case) -> None:
    model = case.model()
    count = sum(parameter.numel() for parameter in model.parameters())
    after = operation(model)
    assert after.get_parameter("lm_head.weight") is after.get_parameter("model.embed_tokens.weight")
    assert sum(parameter.numel() for parameter in after.parameters()) == count


@given(values=configs(length=1))
def test_every_weight_of_the_architecture_is_registered_once(values: dict[str, object]) -> None:
    config = DIYConfig.from_dict(values)
    assert sum(parameter.numel() for parameter in DIYForCausalLM(config).parameters()) == num_parameters(config)


@pytest.mark.parametrize("assign", [False, True])
def test_tensors_are_copied_or_taken_over_as_is_asked(assign: bool) -> None:
    model = DIYForCausalLM(DIYConfig(vocab_size=8, num_layers=1, hidden_size=4, num_heads=2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    for name, tensor in model.state_dict().items():
        assert (tensor.data_ptr() == state[name].data_ptr()) == assign, name
