"""The diagnosis: from verdicts and symptoms to the name of the bug, measured on models it has not learned from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diymodel.config import DIYConfig
from diymodel.verify import check_causal_lm
from diymodel.verify.adapters import LM
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.diagnose import Signatures, known_causes, leave_one_base_out, signatures
from diymodel.verify.html import to_html
from diymodel.verify.registry import list_checks
from diymodel.verify.repairs import CausalAttention, NoDropout, PositionsAfterTheCache, Repair, SoftmaxOverKeys
from diymodel.verify.report import Report
from diymodel.verify.runner import PROFILES, Settings, diagnose, verify_one
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.subject import resolve
from diymodel.verify.symptoms import list_symptoms, observe
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

EXAMPLES = Path(__file__).parent / "examples"
MY_MODEL = EXAMPLES / "my_model.py"
FRESH = [  # bugs in models that no diagnosis has learned from: file, name, the line and what becomes of it, the class
    (
        "multi_query.py",
        "MultiQuery",
        "[:, :-1].flatten(0, 1), labels[:, 1:].flatten()",
        ".flatten(0, 1)[:-1], labels.flatten()[1:]",
        "labels-flattened-before-shift",
    ),
    ("multi_query.py", "MultiQuery", "s.softmax(-1)", "s.softmax(-2)", "softmax-wrong-axis"),
    ("multi_query.py", "MultiQuery", "triu(S - T + 1)", "triu(S - T + 2)", "mask-sees-next-token"),
    ("nano_gpt.py", "GPT", "self.dropout if self.training else 0.0", "self.dropout", "dropout-active-in-eval"),
]
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
REPAIRS = (CausalAttention, NoDropout, PositionsAfterTheCache, SoftmaxOverKeys)


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


@pytest.mark.parametrize(("file", "name", "old", "new", "slug"), FRESH, ids=[slug for *_, slug in FRESH])
def test_a_bug_in_a_model_outside_the_zoo_is_named(
    tmp_path: Path, file: str, name: str, old: str, new: str, slug: str
) -> None:
    source = (EXAMPLES / file).read_text(encoding="utf-8")
    assert source.count(old) == 1
    path = tmp_path / file
    path.write_text(source.replace(old, new), encoding="utf-8")
    report = check_causal_lm(f"{path}:{name}", profile="quick")
    assert report.diagnosis[0].bug == slug, report.to_text()


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
