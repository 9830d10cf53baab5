"""What a module lacks is found, and no bug is named that would have to be in it."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify import check_causal_lm
from diymodel.verify.catalogue import bug_class, list_bug_classes
from diymodel.verify.diagnose import signatures
from diymodel.verify.experiments.parts import PARTS, absent_parts
from diymodel.verify.registry import list_checks
from diymodel.verify.report import Failure, Result
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.subject import Subject
from diymodel.verify.symptoms import Patient
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

CONFIG = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 16}
CHECKS = {check.id: check for check in list_checks()}
_ASKED = 2  # bugs of a class, on the first bases
COMPUTED = ("rotation", "distance_bias", "dropout", "attention", "router", "window", "carried_state")


def absent(subject: Subject, *failed: str) -> frozenset[str]:
    failure = Failure("told", (), CONFIG, {"config": CONFIG}, "")
    return absent_parts(subject, [Result(CHECKS[id], "failed", failure=failure) for id in failed])


@pytest.mark.parametrize(
    ("base", "has"),
    [
        ("rotary", {"rotation", "attention"}),
        ("alibi", {"distance_bias", "attention"}),
        ("nanogpt", {"attention", "dropout"}),
        ("switch", {"router"}),
        ("windowed", {"window"}),
        ("recurrent", {"carried_state"}),
    ],
)
def test_what_a_model_has_is_not_absent(base: str, has: set[str]) -> None:
    assert not has & absent(BASES[base].subject(), "causality.edit")


@pytest.mark.parametrize(
    ("base", "lacks"),
    [
        ("rotary", {"distance_bias", "router", "window", "carried_state"}),
        ("alibi", {"rotation", "router", "window", "carried_state"}),
        ("nanogpt", {"rotation", "distance_bias", "router"}),
        ("recurrent", {"distance_bias"}),
    ],
)
def test_what_a_model_lacks_is_found(base: str, lacks: set[str]) -> None:
    assert lacks <= absent(BASES[base].subject(), "decode.chunks")


class Mean(nn.Module):
    """The mean of what came before: nothing else."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size)  # type: ignore[attr-defined]

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        logits: Tensor = self.head((self.embed(input_ids).cumsum(1) / places[:, None]).tanh())
        return logits


def test_a_model_with_next_to_nothing_lacks_next_to_everything() -> None:
    lacking = absent(Subject(Mean), "sensitivity.order_matters")
    assert {"distance_bias", "dropout", "attention", "router", "window", "padding", "padded_prompts", "positions"} <= (
        lacking
    )


class Exponentials(nn.Module):
    """What came before, weighed by powers of e."""

    def __init__(self, config: object, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size)  # type: ignore[attr-defined]
        self.weigh = weigh

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.weigh(self.embed(input_ids)))
        return logits


def decayed(x: Tensor) -> Tensor:
    """A recurrence whose state decays by what the token says."""
    return (x * (-x.square()).exp()).cumsum(1)


def softmax_by_hand(x: Tensor) -> Tensor:
    weights = (x @ x.mT).exp().tril()
    return weights / weights.sum(-1, keepdim=True) @ x


def softmax_by_blocks(x: Tensor) -> Tensor:
    """Keys two at a time, each with the largest score so far taken away."""
    largest, total, out = (torch.zeros_like(x[..., :n]) for n in (1, 1, 8))
    for keys in x.split(2, 1):
        scores = x @ keys.mT
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, old = (scores - new).exp(), (largest - new).exp()
        total, out, largest = total * old + weights.sum(-1, keepdim=True), out * old + weights @ keys, new
    return out / total


def test_noise_of_any_kind_is_drawn_as_dropout_is() -> None:
    for weigh in (lambda x: x + torch.randn(x.shape, dtype=x.dtype), lambda x: x + torch.empty_like(x).normal_()):
        subject = Subject(lambda config, weigh=weigh: Exponentials(config, weigh))
        assert "dropout" not in absent(subject, "forward.deterministic")


class DropsByHand(Exponentials):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        logits: Tensor = self.head(x * (torch.rand_like(x) >= 0.5) if self.training else x)
        return logits


def test_a_dropout_by_hand_in_training_mode_alone_is_one() -> None:
    subject = Subject(lambda config: DropsByHand(config, decayed))
    assert "dropout" not in absent(subject, "numerics.bfloat16_near_float64")


@pytest.mark.parametrize(("weigh", "lacks"), [(decayed, True), (softmax_by_hand, False), (softmax_by_blocks, False)])
def test_a_decay_is_no_softmax_and_one_by_hand_is(weigh: Callable[[Tensor], Tensor], lacks: bool) -> None:
    subject = Subject(lambda config: Exponentials(config, weigh))
    assert ("attention" in absent(subject, "numerics.bfloat16_near_float64")) is lacks


def test_a_setting_that_no_failing_check_gives_is_absent() -> None:
    subject = BASES["writer"].subject()
    assert "top_k" not in absent(subject, "generation.top_k")
    assert "top_k" in absent(subject, "generation.keeps_prompt")


def test_what_cannot_be_told_is_not_absent() -> None:
    def refuses(config: object) -> nn.Module:
        raise NotImplementedError

    subject = Subject(refuses)
    assert not absent(subject, "causality.edit") & set(COMPUTED)
    assert not absent_parts(BASES["alibi"].subject(), [])


def test_classes_need_parts_that_there_are() -> None:
    needed = {part for found in list_bug_classes() for part in found.needs}
    assert needed == set(PARTS)


@pytest.mark.parametrize("slug", sorted({bug.slug for bug in list_bugs() if bug_class(bug.slug).needs}))
def test_every_bug_of_the_zoo_has_what_its_class_needs(slug: str) -> None:
    killers = {sample.bug: sample.killers for sample in read_samples()}
    needed = {part: PARTS[part] for part in bug_class(slug).needs}
    with mock.patch.dict(PARTS, needed, clear=True):  # asking for all takes minutes
        for bug in [bug for bug in list_bugs() if bug.slug == slug and killers[bug.id]][:_ASKED]:
            assert not absent(bug.subject(), *killers[bug.id]), bug.id


@pytest.mark.parametrize(("rows", "lacks"), [(1, True), (2, False), (None, False)])
def test_one_cache_for_all_rows_explains_no_failure_of_one_row(rows: int | None, lacks: bool) -> None:
    check = next(check for check in list_checks() if check.id == "decode.cached_equals_full")
    failure = Failure("told", (), {}, {} if rows is None else {"rows": rows}, "")
    patient = Patient(BASES["rotary"].subject(), {check.id: Result(check, "failed", failure=failure)})
    assert PARTS["several_rows"](patient) is not lacks


def test_reordered_rows_are_always_several_and_say_nothing_beside_one_that_fails_alone() -> None:
    single, reordered = (
        Result(CHECKS[id], "failed", failure=Failure("told", (), {}, values, ""))
        for id, values in (("decode.session", {"rows": 1}), ("decode.rows_reordered", {"batch": 2}))
    )
    subject = BASES["rotary"].subject()
    for failed, has in (([reordered], True), ([single, reordered], False)):
        assert PARTS["several_rows"](Patient(subject, {result.check.id: result for result in failed})) is has


@pytest.mark.parametrize(("base", "has"), [("onmodule", True), ("rotary", False), ("nanogpt", False)])
def test_tokens_that_do_not_exist_are_drawn_where_there_are_logits_for_them(base: str, has: bool) -> None:
    assert ("logits_to_spare" in absent(BASES[base].subject(), "generation.greedy_is_argmax")) is not has


def test_what_is_impossible_is_not_named() -> None:
    sample = next(s for s in read_samples() if s.slug == "alibi-lost-in-decode")
    impossible = frozenset({"alibi-lost-in-decode"})
    without = Sample("", "", "", sample.verdicts, sample.symptoms, impossible)
    assert signatures().diagnose(sample)[0].bug == "alibi-lost-in-decode"
    assert "alibi-lost-in-decode" not in {found.bug for found in signatures().diagnose(without)}


@pytest.mark.parametrize("isolate", [False, True])
def test_a_report_names_no_cause_that_cannot_be(isolate: bool) -> None:
    base = BASES["experts"]
    broken = base.source.replace("argmax(dim=-1)", "argmin(dim=-1)")
    assert broken != base.source
    report = check_causal_lm(base.subject(broken), profile="quick", only=["generation.greedy*"], isolate=isolate)
    (failed,) = report.failed
    assert failed.failure is not None
    assert {"temperature-zero", "top-k-edge"} <= set(failed.check.causes)
    assert not {"temperature-zero", "top-k-edge"} & set(failed.failure.likely_causes)
    assert not {"temperature-zero", "top-k-edge"} & {found.bug for found in report.diagnosis}
