"""The diagnosis: from verdicts and symptoms to the name of the bug, measured on models it has not learned from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.diagnosis import EXAMPLES, TRIES, Try
from diymodel.verify import check_causal_lm
from diymodel.verify.catalogue import list_bug_classes
from diymodel.verify.diagnose import Signatures, known_causes, signatures
from diymodel.verify.examination import diagnose
from diymodel.verify.html import to_html
from diymodel.verify.registry import list_checks
from diymodel.verify.report import Diagnosis, Failure, Report, Result
from diymodel.verify.runner import run_checks, verify_one
from diymodel.verify.samples import Sample, read_samples
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve
from diymodel.verify.symptoms import list_symptoms
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

MY_MODEL = EXAMPLES / "my_model.py"
SAMPLES = read_samples()


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


def both(slug: str, other: str, base: str) -> Sample:
    """What a model with two bugs would show, were neither in the other's way."""
    one, two = (next(s for s in SAMPLES if s.slug == name and s.base == base) for name in (slug, other))
    failed = {id for sample in (one, two) for id in sample.verdicts if sample.verdicts[id] == "failed"}
    verdicts = {id: "failed" if id in failed else status for id, status in one.verdicts.items()}
    facts = one.symptoms.keys() | two.symptoms.keys()
    return Sample("", "", base, verdicts, {id: any(s.symptoms.get(id) for s in (one, two)) for id in facts})


def test_two_bugs_at_once_are_told_apart() -> None:
    sample = both("position-advances-per-layer", "labels-not-shifted", "hub")
    first, second, *others = signatures().diagnose(sample)
    assert {first.bug, second.bug} == {"position-advances-per-layer", "labels-not-shifted"}
    assert (first.beside, second.beside) == (False, True)
    assert min(first.score, second.score) > 0.9, "each by its own failures"
    assert not any(found.beside for found in others)
    assert {found.bug for found in (first, second, *others)} == {found.bug for found in signatures().rank(sample)}


def test_one_bug_is_not_taken_for_two() -> None:
    several = [s.bug for s in SAMPLES if any(found.beside for found in signatures().diagnose(s))]
    assert len(several) / len(SAMPLES) < 0.08, several


def test_what_stands_beside_the_likeliest_is_said_so() -> None:
    results = [Result(check, "failed") for check in list_checks() if check.id in ("loss.value", "decode.chunks")]
    found = [Diagnosis("labels-not-shifted", 0.97, ("loss.value",))]
    found += [Diagnosis("chunk-unmasked", 0.95, ("decode.chunks",), beside=True)]
    found += [Diagnosis("cached-path-diverges", 0.05, ("decode.chunks",))]
    report = Report("x", results=results, diagnosis=tuple(found))
    assert [lead for lead, _ in report.led] == ["", "beside", "instead"]
    text = report.to_text()
    places = [text.index(part) for part in ("97%", "A further bug", "95%", "Or instead", " 5%")]
    assert places == sorted(places)
    html = to_html(report, "zh")
    assert html.index("chunk-unmasked") > html.index("此外")
    assert [one["beside"] for one in json.loads(report.to_json())["diagnosis"]] == [False, True, False]
    one = Report("x", results=results, diagnosis=(found[0], found[2]))
    assert [lead for lead, _ in one.led] == ["", ""]


@pytest.mark.parametrize(("score", "doubtful"), [(0.17, True), (0.9, False)])
def test_a_likeliest_that_is_unlikely_is_said_to_fit_badly(score: float, doubtful: bool) -> None:
    results = [Result(check, "failed") for check in list_checks() if check.id == "decode.chunks"]
    report = Report("x", results=results, diagnosis=(Diagnosis("chunk-unmasked", score, ("decode.chunks",)),))
    assert ("fits well" in report.to_text()) is doubtful
    assert ("很吻合" in to_html(report, "zh")) is doubtful


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
    assert 0.999 < sum(found.score for found in ranked) <= 1  # the rest is a bug of no class
    scores = [round(found.score, 9) for found in ranked]  # as they are ordered by
    assert scores == sorted(scores, reverse=True)
    seen = set(one.killers) | {id for id, shows in one.symptoms.items() if shows}
    assert all(found.evidence and set(found.evidence) <= seen for found in ranked)


def test_a_class_falls_where_its_symptoms_were_looked_for_and_none_showed() -> None:
    leak = next(found for found in SAMPLES if found.slug == "convolution-not-causal" and found.base == "recurrent")
    silent = replace(leak, symptoms=dict.fromkeys(leak.symptoms, False))
    unasked = Signatures(SAMPLES, known_causes())
    unasked._silent = dict.fromkeys(unasked._silent, 0.0)
    before = unasked.rank(silent)[0].score
    after = max((found.score for found in signatures().rank(silent)), default=0.0)
    assert after < min(before, 0.3), "no experiment speaks for any class: the rest is a bug that is none of them"


def test_a_class_that_no_failed_check_names_is_unlikely() -> None:
    """Of every known bug a check fails that names it; position_ids are not the first suspect of an ignored mask."""
    causes = known_causes()
    for found in SAMPLES:
        assert not found.killers or any(found.slug in causes[id] for id in found.killers), found.bug
    ranked = signatures().rank(sample({"padding.mask_is_used"}, **{"positions.ignored": True}))
    assert ranked[0].bug == "padding-mask-ignored"


def test_what_an_experiment_rules_out_is_not_evidence() -> None:
    failed = {"generation.greedy_is_argmax", "generation.restores_mode"}
    answers = {"modes.call_turns_training_on": True, "modes.generates_rightly_with_dropout_0": False}
    first = signatures().rank(sample(failed, **answers))[0]
    assert first.bug == "mode-not-restored"
    assert set(first.evidence) == {"generation.restores_mode", "modes.call_turns_training_on"}
    again = signatures().rank(sample(failed, **{**answers, "modes.generates_rightly_with_dropout_0": True}))[0]
    assert "generation.greedy_is_argmax" in again.evidence


@pytest.mark.parametrize(
    ("one", "other", "check", "settled"),
    [
        ("masked-row-nan", "softmax-overflow-half", "numerics.large_activations_finite", "numerics.scores_overflow"),
        ("no-positions", "gradient-detached", "gradients.reach_every_parameter", "gradients.path_is_cut"),
    ],
)
def test_what_an_experiment_settles_is_no_other_bugs_doing(one: str, other: str, check: str, settled: str) -> None:
    """Some known bugs of the one class fail the check as well, for reasons that the experiment leaves out."""
    own = {
        "masked-row-nan": ("padding.all_padding_finite", "attention.row_sees_nothing"),
        "no-positions": ("sensitivity.order_matters", "attention.place_is_nothing"),
    }[one]
    found = signatures().diagnose(sample({own[0], check}, **{own[1]: True, settled: True}))
    assert {first.bug: first.beside for first in found[:2]} in ({one: False, other: True}, {one: True, other: False})
    assert check not in next(bug for bug in found if bug.bug == one).evidence
    assert min(first.score for first in found[:2]) > 0.9


# --- from end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def restarting(tmp_path: Path) -> Path:
    """A stranger's model whose positions restart in decode."""
    path = tmp_path / "my_model.py"
    source = MY_MODEL.read_text(encoding="utf-8")
    assert "torch.arange(P, P + T, " in source
    path.write_text(source.replace("torch.arange(P, P + T, ", "torch.arange(T, "), encoding="utf-8")
    return path


def test_a_strangers_bug_is_named_in_every_form_of_the_report(restarting: Path) -> None:
    report = check_causal_lm(f"{restarting}:LM", profile="quick", only=["decode.c*", "causality.*"], isolate=True)
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
    """By failures as they were found in few trials: making those of all checks small takes most of a minute."""
    report = Report(fresh.file)
    subject = resolve(fresh.plant(tmp_path))
    report.results = list(run_checks(subject, list_checks(), Settings(4, shrink=False, optional=False)))
    diagnose(report, subject)
    assert report.diagnosis[0].bug == fresh.slug, report.to_text()


def test_pytest_names_it_in_its_summary(restarting: Path) -> None:
    options = ["--lm", f"{restarting}:LM", "--lm-profile", "quick", "-q", "-p", "no:cacheprovider", "-k", "decode.c"]
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


def test_what_no_diagnosis_explains_is_told_with_its_own_likeliest_cause() -> None:
    checks = {check.id: check for check in list_checks()}
    ids, causes = ("decode.unrelated_call", "decode.branch"), (("state-survives-calls", "cache-rows-shared"), ())
    report = Report("x", diagnosis=(Diagnosis("rmsnorm-overflow-half", 0.9, ()),), unexplained=ids)
    report.results = [
        Result(checks[id], "failed", failure=Failure("saw it", likely, {}, {}, "replay"))
        for id, likely in zip(ids, causes, strict=True)
    ]
    assert "Not explained by these: decode.unrelated_call (state-survives-calls?), decode.branch\n" in report.to_text()
    assert "<code>decode.unrelated_call</code> (state-survives-calls?), <code>decode.branch</code>" in to_html(report)
