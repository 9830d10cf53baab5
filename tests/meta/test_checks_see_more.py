"""What checks see beyond the zoo's bugs, and what they must not take for one: bases with a change, and drawn values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diymodel import DIYConfig
from diymodel.verify.adapters import LM
from diymodel.verify.checks.causality import edited
from diymodel.verify.randomness import seeded
from diymodel.verify.runner import replay, verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import OWN, Subject
from diymodel.verify.trial import Trial
from diymodel.zoo.base import BASES
from tests.meta.verdicts import CHECKS, EXAMPLES, subject
from tests.test_healthy_strangers import Clamped

CONFIG = DIYConfig(
    vocab_size=10, num_layers=1, hidden_size=4, num_heads=1, num_kv_heads=1, intermediate_size=4, max_seq_len=8
)


class Changed(NamedTuple):
    """A base with other lines."""

    check_id: str
    status: str  # what the check must say
    base: str
    lines: dict[str, str]  # old -> new
    what: str  # the change

    def subject(self) -> Subject:
        source = BASES[self.base].source
        for old, new in self.lines.items():
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        return BASES[self.base].subject(source)


CHANGED = [
    Changed(
        "window.width",
        "failed",
        "windowed",
        {"gap < WINDOW)\n    return F.": "gap % (WINDOW + 2) < WINDOW)\n    return F."},
        "slots of a ring are seen again",
    ),
    Changed(
        "window.width",
        "passed",
        "windowed",
        {
            "self.embed = ": "self.longest = config.max_seq_len\n        self.embed = ",
            "x = self.embed(": "assert len(position) <= self.longest\n        x = self.embed(",
        },
        "refuses what is longer than it was built for",
    ),
    Changed(
        "padding.left_with_cache",
        "passed",
        "learned",
        {
            'output["past_key_values"] = presents': 'output["past_key_values"] = presents\n'
            '            output["logits"] = output["logits"][:, -1:]'
        },
        "gives the last logits only on a cache",
    ),
    Changed(
        "loss.all_ignored",
        "passed",
        "hub",
        {
            "        return Output(": "            if bool((targets == -100).all()):\n"
            "                loss = torch.zeros(())\n        return Output("
        },
        "a loss of 0 without a graph",
    ),
    Changed(
        "generation.eos_per_row",
        "failed",
        "writer",
        {
            "done.all()": "done.any()",
            "        pad_token_id: int = 0,\n": "",
            "torch.where(done, pad_token_id, new)": "new.masked_fill(done, 0)",
        },
        "any row ends all, and no token to fill up with is asked for",
    ),
    Changed(
        "generation.eos_per_row",
        "passed",
        "writer",
        {
            "        B, T = input_ids.shape\n        if T +": "        B, T = input_ids.shape\n        assert B == 1\n"
            "        if T +",
            "                tokens = torch.cat((tokens, new": "                if int(new) == eos_token_id:\n"
            "                    break\n                tokens = torch.cat((tokens, new",
        },
        "takes one row, and leaves the eos out",
    ),
    Changed(
        "decode.rows_reordered",
        "skipped",
        "windowed",
        {
            "        self.layers = {layer: (k[rows]": "        raise NotImplementedError\n"
            "        self.layers = {layer: (k[rows]"
        },
        "a way to reorder that is not implemented",
    ),
    Changed(
        "generation.restores_mode",
        "passed",
        "writer",
        {
            "B, T = input_ids.shape\n        if T +": "assert not self.training\n"
            "        B, T = input_ids.shape\n        if T +"
        },
        "training mode is refused",
    ),
    Changed(
        "decode.no_graph",
        "failed",
        "windowed",
        {
            "    def forward(self, input_ids: Tensor, cache:": "    @torch.enable_grad()\n"
            "    def forward(self, input_ids: Tensor, cache:"
        },
        "a cache object keeps a graph",
    ),
    Changed("generation.top_k", "failed", "writer", {"if top_k is not None": "if top_k == 0"}, "top_k is ignored"),
    Changed(
        "checkpoint.round_trip",
        "failed",
        "pretrained",
        {'Settings(**content["config"])': 'Settings(**{**content["config"], "dropout": 0.0})'},
        "a setting that eval mode does not show is lost",
    ),
    Changed(
        "training.optimizer_is_complete",
        "passed",
        "parallel",
        {
            "def configure_optimizers(self, train_config: Any) -> torch.optim.Optimizer:": "def setup_optimizers(self, "
            "weight_decay: float) -> Any:\n        from types import SimpleNamespace\n\n"
            "        train_config = SimpleNamespace(weight_decay=weight_decay)",
            "return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas)": "return "
            '[torch.optim.AdamW(groups[:1]), SimpleNamespace(param_groups=groups[1:], step=None), "cosine"]',
        },
        "two optimizers, and one of them no subclass of torch's",
    ),
]


@pytest.mark.parametrize("changed", CHANGED, ids=[f"{row.what}-{row.check_id}" for row in CHANGED])
def test_a_changed_base(changed: Changed) -> None:
    result = verify_one(changed.subject(), CHECKS[changed.check_id], Settings(EXAMPLES, shrink=False))
    assert result.status == changed.status, result
    assert result.failure is None or "the subject raised" not in result.failure.message


DRAWN = [  # where one example tells
    (
        Changed(
            "loss.pad_token_scored",
            "failed",
            "hub",
            {
                "if labels is not None:\n": "if labels is not None:\n            labels = labels.where(input_ids != "
                "(-100 if self.config.pad_token_id is None else self.config.pad_token_id), -100)\n"
            },
            "labels are ignored where the token fills up",
        ),
        {"padding": 2, "rows": 1, "length": 3, "tokens": [[0, 0, 0]]}
        | {"live": [[0, 1]], "label_shift": 0, "first_ignored": True},
    ),
    (
        Changed(
            "generation.temperature_zero",
            "failed",
            "writer",
            {
                "if temperature == 0:\n        return logits.argmax(-1)\n    ": "",
                "logits / temperature": "logits / max(temperature, 0.1)",
            },
            "few rows of many get an unlikely token",
        ),
        {"weights": 16, "length": 1, "tokens": [[2]], "beside": "", "seed": 0},
    ),
    (
        Changed(
            "gradients.reach_every_parameter",
            "passed",
            "plain",
            {
                "self.head = ": "self.far = nn.Parameter(torch.ones(()))\n        self.head = ",
                "T = x.shape[1]\n": "T = x.shape[1]\n        assert T < len(self.positions)\n"
                "        scale = self.far if T > 4 else 1\n",
                "self.head(self.encoder(": "self.head(scale * self.encoder(",
            },
            "more tokens reach more, and as many as it has positions are refused",
        ),
        {"length": 2, "tokens": [1, 2]},
    ),
]


@pytest.mark.parametrize(("changed", "drawn"), DRAWN, ids=[f"{row.what}-{row.check_id}" for row, _ in DRAWN])
def test_one_example_is_enough(changed: Changed, drawn: dict[str, Any]) -> None:
    values = {"config": CONFIG.to_dict(), "weights": 0, "sharpness": 1, **drawn}
    assert replay(changed.subject(), CHECKS[changed.check_id], values).status == changed.status


@pytest.mark.parametrize("check_id", ["loss.all_ignored"])
def test_a_gradient_is_not_asked_of_who_has_none(check_id: str) -> None:
    changed = Changed(
        check_id,
        "passed",
        "hub",
        {"loss = total / (": "loss = (0 * logits.sum()).abs().sqrt() + total / ("},
        "a NaN as gradient",
    )
    able, unable = changed.subject(), changed.subject()
    unable.lacks["gradient"] = "not for training"
    assert [verify_one(x, CHECKS[check_id], Settings(3)).status for x in (able, unable)] == ["failed", "passed"]


@pytest.mark.parametrize(
    ("check_id", "lines"),
    [
        ("generation.top_p", {"if temperature == 0:": "assert temperature == 0\n    if temperature == 0:"}),
        ("generation.restores_mode", {"modes = [": "assert max_new_tokens > 1\n        modes = ["}),
    ],
)
def test_what_is_refused_in_any_case_is_no_refusal_of_a_setting(check_id: str, lines: dict[str, str]) -> None:
    refusing = Changed(check_id, "failed", "writer", lines, "").subject()
    refusing.__dict__["convention"] = subject("writer").convention
    failure = verify_one(refusing, CHECKS[check_id], Settings(3)).failure
    assert failure is not None
    assert failure.message.startswith("the subject raised AssertionError")


@pytest.mark.parametrize(
    ("check_id", "name", "largest"),
    [
        ("causality.edit", "cut", None),
        ("causality.truncation", "cut", None),
        ("causality.in_training", "cut", None),
        ("causality.gradient", "cut", None),
        ("state.resized_vocabulary", "added", 3),
    ],
)
def test_what_is_drawn_stays_in_bounds(check_id: str, name: str, largest: int | None) -> None:
    """``largest``; None: the last position."""
    seen: list[dict[str, Any]] = []

    def spied(trial: Trial) -> None:
        CHECKS[check_id].function(trial)
        seen.append(trial.values)

    base = "kept" if largest else OWN
    assert verify_one(subject(base), replace(CHECKS[check_id], function=spied), Settings(EXAMPLES)).status == "passed"
    assert all(1 <= values[name] <= (largest or values["length"] - 1) for values in seen)


@pytest.mark.parametrize("check_id", ["generation.random_state_untouched"])
def test_a_draw_without_a_choice_may_use_the_random_state(check_id: str) -> None:
    assert verify_one(Subject(Clamped), CHECKS[check_id], Settings(EXAMPLES)).status == "passed"


@pytest.mark.parametrize("check_id", ["causality.edit"])
def test_an_edit_is_another_token_of_each_row_at_one_position(check_id: str) -> None:
    lm = LM(nn.Identity(), CONFIG, subject(OWN).convention)
    ids = torch.tensor([[0, 1, 2], [9, 8, 7]])

    @settings(database=None, deadline=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        other = edited(Trial(subject(OWN), data.draw), lm, ids, 1)
        assert (other != ids).tolist() == [[False, True, False]] * 2
        assert bool(((other >= 0) & (other < 10)).all())

    with seeded():
        holds()
