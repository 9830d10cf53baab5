"""The diagnosis: from verdicts and symptoms to the name of the bug, measured on models it has not learned from."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.diagnosis import EXAMPLES, TRIES, Try
from diymodel.config import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.adapters import LM
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.diagnose import Signatures, known_causes, leave_one_base_out, signatures
from diymodel.verify.handing import Calls, handed, right_mask, right_positions
from diymodel.verify.html import to_html
from diymodel.verify.randomness import seeded
from diymodel.verify.registry import list_checks
from diymodel.verify.repairs import (
    CachedKeysAsHeld,
    CausalAttention,
    NoDropout,
    PositionsAfterTheCache,
    PositionsOfTokensSeen,
    Repair,
    SoftmaxOverKeys,
)
from diymodel.verify.report import Failure, Report, Result
from diymodel.verify.runner import PROFILES, Settings, diagnose, verify_one
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.subject import resolve
from diymodel.verify.symptoms import Patient, list_symptoms, observe
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

MY_MODEL = EXAMPLES / "my_model.py"
SAMPLES = read_samples()
LIVE = (  # bugs, one for each group of symptoms
    "attention-scale-wrong-rotary-reference.logits",
    "rope-pairing-convention-hub-reference.logits",
    "router-weights-not-normalised-switch-reference.logits",
    "softmax-overflow-half-hub-numerics.large_activations_finite",
    "window-off-by-one-windowed-window.width",
    "rope-low-precision-windowed-sensitivity.shift_invariance",
    "position-table-clamped-plain-context.overlong_refused",
    "generated-length-wrong-headwise-generation.keeps_prompt",
    "continues-from-pad-writer-generation.padded_prompt",
    "cache-list-mutated-rotary-decode.branch",
    "tie-lost-saved-directory.complete",
)
REPAIRS = (CausalAttention, NoDropout, PositionsAfterTheCache, PositionsOfTokensSeen, SoftmaxOverKeys)
WHERE_WRONG = (  # symptoms that ask what is different where a cached step is wrong
    "cache.right_with_keys_as_held",
    "decode.right_in_one_row",
    "decode.right_in_one_layer",
    "decode.right_token_by_token",
    "decode.right_at_first",
    "decode.right_after_one_call",
    "decode.equal_tokens_right",
    "decode.right_without_gradients",
    "decode.takes_other_parts",
    "decode.embeds_another_position",
    "decode.wrong_before_attention",
    "decode.right_through_attention",
)
NOT_SO = (  # and those that ask what a cached step does
    "cache.list_holds_others",
    "cache.logits_of_another_dtype",
    "decode.ignores_the_prefix",
    "decode.forgets_the_oldest",
    "decode.sees_more",
    "decode.chunk_loses_the_cached",
)


def sample(failed: set[str], passed: set[str] = frozenset(), **symptoms: bool) -> Sample:  # type: ignore[assignment]
    return Sample("", "", "", {**dict.fromkeys(passed, "passed"), **dict.fromkeys(failed, "failed")}, symptoms)


# --- what it is learned from -----------------------------------------------------------------------------------------


def test_the_samples_are_those_of_the_zoo_and_the_checks() -> None:
    assert {found.bug for found in SAMPLES} == {bug.id for bug in list_bugs()}, "diymodel zoo matrix --measure"
    assert set(SAMPLES[0].verdicts) == {check.id for check in list_checks()}, "diymodel zoo matrix --measure"
    assert {id for found in SAMPLES for id in found.symptoms} <= set(list_symptoms())


def test_every_symptom_shows_on_a_bug_it_points_to_and_not_on_all() -> None:
    for symptom in list_symptoms().values():
        answers = [(found.slug, found.symptoms[symptom.id]) for found in SAMPLES if symptom.id in found.symptoms]
        assert any(shows and slug in symptom.causes for slug, shows in answers), symptom.id
        assert not all(shows for _, shows in answers), symptom.id


def test_symptoms_point_to_classes_of_the_catalogue_in_both_languages() -> None:
    slugs = {found.slug for found in list_bug_classes()}
    for symptom in list_symptoms().values():
        assert set(symptom.causes) <= slugs, symptom.id
        assert symptom.yes.isascii()
        assert not symptom.yes_zh.isascii()


# --- how good it is --------------------------------------------------------------------------------------------------


def test_it_names_bugs_in_models_it_has_not_learned_from() -> None:
    found = leave_one_base_out(SAMPLES)
    assert found.first / found.bugs >= 0.75, found.wrong
    assert found.among_three / found.bugs >= 0.9, found.wrong


def test_two_bugs_at_once_are_both_named() -> None:
    one = next(found for found in SAMPLES if found.slug == "position-advances-per-layer" and found.base == "hub")
    other = next(found for found in SAMPLES if found.slug == "labels-not-shifted" and found.base == "hub")
    both = Sample(
        "",
        "",
        "",
        {
            id: "failed" if "failed" in (one.verdicts[id], other.verdicts[id]) else one.verdicts[id]
            for id in one.verdicts
        },
        {**one.symptoms, **other.symptoms},
    )
    named = [found.bug for found in signatures().rank(both)[:5]]
    assert {one.slug, other.slug} <= set(named), named


def test_nothing_is_said_where_nothing_failed_or_nothing_fits() -> None:
    known = Signatures([], known_causes())
    assert known.rank(sample(set(), {"loss.value", "decode.chunks"})) == []
    assert known.rank(sample({"x.unknown"})) == []
    assert known.rank(sample({"state.tied_weights_stay_tied"}))[0].bug == "tie-lost"


def test_before_anything_is_measured_it_goes_by_what_the_checks_name() -> None:
    known = Signatures([], known_causes())
    failed = {"loss.value"}
    passed = {check.id for check in list_checks()} - failed
    assert known.rank(sample(failed, passed, **{"loss.is_shifted_twice": True}))[0].bug == "labels-shifted-twice"


def test_scores_are_shares_and_evidence_is_what_was_seen() -> None:
    one = next(found for found in SAMPLES if found.slug == "labels-shifted-twice")
    ranked = signatures().rank(one)
    assert sum(found.score for found in ranked) == pytest.approx(1)
    assert [found.score for found in ranked] == sorted((found.score for found in ranked), reverse=True)
    seen = set(one.killers) | {id for id, shows in one.symptoms.items() if shows}
    assert all(set(found.evidence) <= seen for found in ranked)


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def restarting(tmp_path: Path) -> Path:
    """A stranger's model whose positions restart in decode."""
    path = tmp_path / "my_model.py"
    source = MY_MODEL.read_text(encoding="utf-8")
    assert "torch.arange(P, P + T)" in source
    path.write_text(source.replace("torch.arange(P, P + T)", "torch.arange(T)"), encoding="utf-8")
    return path


def test_a_strangers_bug_is_named_in_every_form_of_the_report(restarting: Path) -> None:
    report = check_causal_lm(f"{restarting}:LM", profile="quick", only=["decode.*", "causality.*"], isolate=True)
    first = report.diagnosis[0]
    assert first.bug == "position-restarts-in-decode"
    assert "repair.positions_after_the_cache" in first.evidence
    document = json.loads(report.to_json())["diagnosis"][0]
    assert document["bug"] == first.bug
    assert "Evidence: with the positions of the cached step moved" in document["explanation"]
    for result in report.failed:
        assert result.failure is not None
        assert result.failure.likely_causes[0] == first.bug, result.check.id
    assert "position-restarts-in-decode: On a cache" in report.to_text()
    assert "依据：把解码那一步的位置加上已缓存的长度后" in report.to_text(lang="zh")
    assert "<code>position-restarts-in-decode</code> ·" in to_html(report)


@pytest.mark.parametrize("fresh", TRIES, ids=[fresh.slug for fresh in TRIES])
def test_a_bug_in_a_model_outside_the_zoo_is_named(tmp_path: Path, fresh: Try) -> None:
    report = check_causal_lm(fresh.plant(tmp_path), profile="quick")
    assert report.diagnosis[0].bug == fresh.slug, report.to_text()


def test_pytest_names_it_in_its_summary(restarting: Path) -> None:
    options = ["--lm", f"{restarting}:LM", "--lm-profile", "quick", "-q", "-p", "no:cacheprovider", "-k", "decode"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], capture_output=True, text=True, cwd=restarting.parent, check=False
    )
    summary = run.stdout.partition("Diagnosis")[2]
    assert "position-restarts-in-decode: On a cache" in summary, run.stdout


def test_a_report_says_what_no_diagnosis_explains() -> None:
    subject = BASES["rotary"].subject()
    checks = {check.id: check for check in list_checks()}
    report = Report("x")
    report.results = [verify_one(subject, check, Settings(1)) for check in checks.values() if not check.optional]
    for index, result in enumerate(report.results):
        if result.check.id in ("decode.branch", "numerics.zeros_finite"):
            report.results[index] = replace(result, status="failed")
    diagnose(report, subject)
    said = report.to_text()
    explained = {id for found in report.likely for id in found.evidence}
    assert {"decode.branch", "numerics.zeros_finite"} <= explained | set(report.unexplained), said


# --- the experiments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("base", ["rotary", "hub", "alibi", "nanogpt", "learned"])
def test_a_repair_changes_nothing_in_a_correct_model(repair: type[Repair], base: str) -> None:
    subject = BASES[base].subject()
    config = DIYConfig(vocab_size=16, num_layers=2, hidden_size=8, num_heads=2, max_seq_len=16, dropout=0.0)
    lm = LM(subject.build(config).double().eval(), config, subject.convention)
    ids = torch.arange(6)[None]
    expected = lm.logits(ids)
    lm.around = repair
    torch.testing.assert_close(lm.logits(ids), expected)
    if "cache" not in subject.convention.missing:
        _, past = lm.extend(ids[:, :4])
        torch.testing.assert_close(lm.extend(ids[:, 4:5], past)[0][:, -1], expected[:, 4])


def test_a_softmax_over_queries_is_repaired() -> None:
    scores = torch.randn(1, 2, 3, 3)
    with SoftmaxOverKeys(0, 3):
        assert torch.equal(F.softmax(scores, dim=-2), scores.softmax(-1))


def test_attention_without_a_mask_is_made_causal() -> None:
    q, k, v = torch.randn(3, 1, 1, 3, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with CausalAttention(0, 3):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected)
        torch.testing.assert_close((q @ k.transpose(2, 3) / 2).softmax(-1) @ v, expected)


def test_positions_that_restart_are_moved() -> None:
    table = torch.arange(40).view(10, 4)
    with PositionsAfterTheCache(5, 2):
        assert torch.arange(2).tolist() == [5, 6]
        assert torch.arange(7).tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert torch.equal(table[:2], table.narrow(0, 5, 2))
        assert torch.equal(table[:2, None], table.narrow(0, 5, 2)[:, None])
        assert table[1:3, 0].tolist() == [4, 8]


@pytest.mark.parametrize("change", [right_positions, right_mask])
@pytest.mark.parametrize("base", ["writer", "scribe"])
def test_a_correct_generate_hands_over_the_right_positions_and_mask(base: str, change: Callable[..., None]) -> None:
    subject = BASES[base].subject()
    config = DIYConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2, max_seq_len=16, dropout=0.0)
    lm = LM(subject.build(config).double().eval(), config, subject.convention)
    ids = torch.arange(8).view(2, 4)
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    real = real.flip(1) if lm.generating.pads_left else real
    expected = lm.greedy(ids, 4, real)
    calls = Calls(lm, real)
    with handed(lm, lambda arguments: change(calls, arguments)):
        assert torch.equal(lm.greedy(ids, 4, real), expected)
    assert calls.number == 4
    assert torch.equal(lm.greedy(ids, 4, real), expected)
    assert calls.number == 4, "the hook is still there"


@pytest.mark.parametrize(
    ("id", "modules"),
    [
        ("top-k-edge-writer-generation.top_k", ("continuation", "handed_over", "padding", "padding_steps")),
        ("top-k-edge-scribe-generation.top_k", ("continuation", "handed_over", "padding", "padding_steps")),
        ("masked-nan-leaks-learned-padding.nan_contained", ("padding", "padding_steps")),
        ("masked-nan-leaks-ragged-padding.nan_contained", ("padding", "padding_steps")),
    ],
)
def test_nothing_is_said_of_padding_and_tokens_that_are_right(id: str, modules: tuple[str, ...]) -> None:
    bug = next(bug for bug in list_bugs() if bug.id == id)
    subject, checks = bug.subject(), {check.id: check for check in list_checks()}
    failed = [verify_one(subject, checks[kill], Settings(PROFILES["quick"], shrink=False)) for kill in bug.kills]
    patient = Patient(subject, {result.check.id: result for result in failed})
    questions = [found for found in list_symptoms().values() if found.ask.__module__.rpartition(".")[2] in modules]
    assert len(questions) >= 5
    answers = {found.id: found.ask(patient) for found in questions}
    assert not any(answers.values()), answers
    assert {id for id, answer in answers.items() if answer is False} <= {"padding.first_token_sees_its_future"}


def test_positions_of_earlier_tokens_are_moved_at_one_place_or_all() -> None:
    places: set[tuple[str, int]] = set()
    with PositionsOfTokensSeen(5, 2, found=places):
        assert torch.arange(2, 4).tolist() == [5, 6]
        assert torch.arange(0, 2).tolist() == [0, 1]
        assert torch.arange(5, 7).tolist() == [5, 6]
        assert torch.arange(2, 6, 2).tolist() == [2, 4]
    with PositionsOfTokensSeen(5, 2, only=("elsewhere", 1)):
        assert torch.arange(2, 4).tolist() == [2, 3]
    assert [file for file, _ in places] == [__file__]


def test_only_turned_keys_are_put_back() -> None:
    held, new = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    with CachedKeysAsHeld(3, 1, [held]):
        assert torch.cat((held.flip(-1), new), 2).equal(torch.concat((held, new), 2))
        assert torch.cat((2 * held, new), 2)[:, :, :3].equal(2 * held)
    with CachedKeysAsHeld(3, 1, [torch.stack((new.expand_as(held), held))]):  # several layers in one tensor
        assert torch.cat((held.flip(-1), new), 2)[:, :, :3].equal(held)


@pytest.mark.parametrize("base", ["rotary", "hub", "learned", "onmodule", "windowed", "switch", "supplied", "scribe"])
def test_a_correct_model_has_no_symptoms_of_a_cache(base: str) -> None:
    failed: Any = {"decode.chunks": SimpleNamespace(failure=SimpleNamespace(config={}))}
    patient = Patient(BASES[base].subject(), failed)
    symptoms = list_symptoms()
    assert {id: symptoms[id].ask(patient) for id in WHERE_WRONG} == dict.fromkeys(WHERE_WRONG)
    lacks_generation = "generate" in BASES[base].generation
    asked = [id for id in NOT_SO if not (lacks_generation and id.startswith("generation."))]
    assert not any(symptoms[id].ask(patient) for id in asked)


@pytest.mark.parametrize("base", ["hub", "headwise", "kept", "packed", "pretrained", "resettable", "scribe", "writer"])
def test_no_experiment_on_modes_state_or_gradients_blames_a_correct_model(base: str) -> None:
    config = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 16, "dropout": 0.5}
    failure = Failure("saw none at nothing", (), config, {"config": config}, "")
    failed = {check.id: Result(check, "failed", failure=failure) for check in list_checks()}
    patient = Patient(BASES[base].subject(), failed)
    for found in list_symptoms().values():
        answer = None
        if found.ask.__module__.rpartition(".")[2] in ("arguments", "modes", "saving", "state", "switches", "training"):
            with contextlib.suppress(Exception), seeded():
                answer = found.ask(patient)
        assert not answer, found.id


@pytest.mark.parametrize(
    ("new", "id"),
    [
        ("self.dropout", "modes.dropout_is_told_none"),
        ("self.__dict__.setdefault('drops', self.dropout * self.training)", "modes.decided_earlier"),
    ],
)
def test_what_decides_that_a_strangers_dropout_goes_on(tmp_path: Path, new: str, id: str) -> None:
    old, path = "self.dropout if self.training else 0.0", tmp_path / "nano_gpt.py"
    path.write_text((EXAMPLES / "nano_gpt.py").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    subject, checks = resolve(f"{path}:GPT"), {check.id: check for check in list_checks()}
    result = verify_one(subject, checks["modes.dropout_off_in_eval"], Settings(PROFILES["quick"], shrink=False))
    seen = observe(subject, [result])
    asked = ("modes.dropout_is_told_none", "modes.decided_earlier", "modes.dropout_is_told_to_train")
    assert [name for name in asked if seen[name]] == [id]


@pytest.mark.parametrize("id", LIVE)
def test_symptoms_show_as_they_were_measured(id: str) -> None:
    bug = next(bug for bug in list_bugs() if bug.id == id)
    measured = next(found for found in SAMPLES if found.bug == id)
    subject, checks = bug.subject(), {check.id: check for check in list_checks()}
    settings = Settings(PROFILES["quick"], shrink=False)
    seen = observe(subject, [verify_one(subject, checks[killer], settings) for killer in measured.killers])
    assert seen == measured.symptoms


def test_a_module_that_raises_has_no_symptoms() -> None:
    subject = resolve(None)
    check = next(check for check in list_checks() if check.id == "causality.edit")
    passed = verify_one(subject, check, Settings(PROFILES["quick"]))
    assert observe(subject, [passed]) == {}
