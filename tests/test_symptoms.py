"""Symptoms: what they answer of correct models, and that they answer as was measured on the zoo."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.diagnosis import EXAMPLES
from diymodel.verify import check_causal_lm
from diymodel.verify.examination import examine_isolated
from diymodel.verify.experiments.watchers import Overflows
from diymodel.verify.options import PROFILES
from diymodel.verify.randomness import seeded
from diymodel.verify.registry import list_checks, select_checks
from diymodel.verify.report import Failure, Result
from diymodel.verify.runner import verify_one
from diymodel.verify.samples import read_samples
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject, resolve
from diymodel.verify.symptoms import Patient, list_symptoms, observe
from diymodel.zoo.base import BASES
from diymodel.zoo.bug import list_bugs

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
    "module-never-called-postnorm-gradients.reach_every_parameter",
    "no-positions-experts-sensitivity.order_matters",
    "router-without-gradient-experts-gradients.reach_every_parameter",
    "convolution-not-causal-timeshift-causality.truncation-causality.gradient",
    "mask-sees-next-token-rotary-causality.through_cache",
    "continues-from-pad-scribe-generation.padded_prompt",
    "expert-capacity-drops-tokens-experts-modes.agree_without_dropout",
    "dropout-inverted-headwise-modes.agree_without_dropout",
)
WHERE_WRONG = (  # symptoms that ask what is different where a cached step is wrong
    "cache.right_with_keys_as_held",
    "decode.right_in_one_row",
    "decode.right_in_one_layer",
    "decode.right_token_by_token",
    "decode.right_at_first",
    "decode.right_after_one_call",
    "decode.equal_tokens_right",
    "decode.takes_other_parts",
    "decode.embeds_another_position",
    "decode.wrong_before_attention",
)
NOT_SO = (  # and those that ask what a cached step does
    "cache.list_holds_others",
    "cache.logits_of_another_dtype",
    "decode.ignores_the_prefix",
    "decode.forgets_the_oldest",
    "decode.sees_more",
    "decode.chunk_loses_the_cached",
)
CONFIG: dict[str, Any] = {"vocab_size": 16, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "max_seq_len": 16}
SEEN_IN_BUGS_ONLY = (  # experiments whose yes says that something is wrong
    *("attention.*", "batch.other_rows_matter", "compile.leaks", "experts.*", "leak.*"),
    *("long_row.outputs_grow", "long_row.logits_overflow"),
    "packing.attention_keeps_apart",
    *("paths.*", "sensitivity.blind_to_own_token", "shape.nan_for_one_token"),
    *("window.*", "reference.joins_heads_otherwise", "repair.scaled_scores", "repair.other_*"),
)
NEEDS_ITS_FAILURE = ("leak.in_gradients_only", "leak.with_dropout_only")


def patient(base: str) -> Patient:
    """A correct model of which some failure is told."""
    check = next(check for check in list_checks() if check.id == "causality.in_training")
    failure = Failure("told", (), CONFIG, {}, "")
    subject = BASES[base].subject()
    found = Patient(subject, {}, "cpu")
    found.failed = {"other": Result(check, "failed", failure=failure)}
    subject.reference = lambda config, state, ids: found.lm(**config.to_dict()).logits(ids)
    return found


@pytest.mark.parametrize(
    "base",
    [
        *("rotary", "hub", "plain", "alibi", "fastlike", "switch", "windowed", "packed"),
        *("recurrent", "timeshift", "statespace"),
    ],
)
def test_a_correct_model_shows_none_of_them(base: str) -> None:
    found, shown, asked = patient(base), [], 0
    for id, symptom in list_symptoms().items():
        if id in NEEDS_ITS_FAILURE or not any(fnmatch.fnmatchcase(id, glob) for glob in SEEN_IN_BUGS_ONLY):
            continue
        with seeded(), contextlib.suppress(Exception):  # what the model has not: a cache, packing, a mask
            answer = symptom.ask(found)
            asked += 1
            if answer:
                shown.append(id)
    assert not shown
    assert asked > 15


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
    assert {id for id, answer in answers.items() if answer is False} <= {
        "padding.first_token_sees_its_future",
        "padding.mask_shows_the_future",
        "generation.cache_is_swallowed",
    }


(CHUNKS,) = select_checks(["decode.chunks"])


@pytest.mark.parametrize("base", ["rotary", "hub", "learned", "onmodule", "windowed", "switch", "supplied", "scribe"])
def test_a_correct_model_has_no_symptoms_of_a_cache(base: str) -> None:
    failed: Any = {"decode.chunks": SimpleNamespace(failure=SimpleNamespace(config={}), check=CHUNKS)}
    patient = Patient(BASES[base].subject(), failed)
    symptoms = list_symptoms()
    assert {id: symptoms[id].ask(patient) for id in WHERE_WRONG} == dict.fromkeys(WHERE_WRONG)
    lacks_generation = "generate" in BASES[base].generation
    asked = [id for id in NOT_SO if not (lacks_generation and id.startswith("generation."))]
    assert not any(symptoms[id].ask(patient) for id in asked)


@pytest.mark.parametrize(
    "base", ["hub", "headwise", "kept", "packed", "pretrained", "resettable", "scribe", "writer", "switch", "experts"]
)
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
    seen = dict(observe(subject, [result]))
    asked = ("modes.dropout_is_told_none", "modes.decided_earlier", "modes.dropout_is_told_to_train")
    assert [name for name in asked if seen[name]] == [id]


def told(check_id: str, **values: Any) -> dict[str, Result]:
    """A failure of a check, with these values of its trial."""
    check = next(check for check in list_checks() if check.id == check_id)
    return {check_id: Result(check, "failed", failure=Failure("told", (), CONFIG, {"config": CONFIG, **values}, ""))}


@pytest.mark.parametrize(("rows", "answer"), [(1, False), (2, True)])
def test_rows_are_not_to_blame_where_one_row_alone_failed(rows: int, answer: bool) -> None:
    bug = next(bug for bug in list_bugs() if bug.slug == "cache-rows-shared" and bug.base == "kept")
    found = Patient(bug.subject(), told("decode.cached_equals_full", rows=rows))
    assert list_symptoms()["decode.right_in_one_row"].ask(found) is answer


class Routed(nn.Module):
    """A mixture of twelve experts of which each token is given to one, so that a few tokens leave most out."""

    def __init__(self, config: Any, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)
        self.gate = nn.Linear(d, 12, bias=False)
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(12))
        self.weigh = weigh

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows = (chosen == index).any(-1)
            out[rows] = self.experts[index](x[rows]) * self.weigh(weights[rows])
        logits: Tensor = self.head(x + out).unflatten(0, input_ids.shape)
        return logits


@pytest.mark.parametrize(
    ("weigh", "yes"),
    [
        (lambda weights: weights, []),
        (lambda w: w / (w.sum(-1, keepdim=True) + 1e-20), ["gradients.none_at_the_router"]),
    ],
    ids=["right", "router without gradient"],
)
def test_an_expert_that_few_tokens_leave_out_is_no_module_that_is_never_called(
    weigh: Callable[[Tensor], Tensor], yes: list[str]
) -> None:
    failed = told("gradients.reach_every_parameter")
    seen = dict(observe(Subject(lambda config: Routed(config, weigh)), failed.values()))
    asked = ("gradients.module_not_called", "gradients.none_at_the_router", "gradients.position_table_not_used")
    assert [id for id in asked if seen[id]] == yes


class TableLeftOver(nn.Module):
    """A table of positions that nothing looks at; a decay tells the order, or nothing does."""

    def __init__(self, config: Any, decay: float) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.positions = nn.Embedding(config.vocab_size, d), nn.Embedding(config.max_seq_len, d)
        self.head, self.decay = nn.Linear(d, config.vocab_size), decay

    def forward(self, input_ids: Tensor) -> Tensor:
        x, at = self.embed(input_ids), torch.arange(input_ids.shape[1])
        ages = (at[:, None] - at).to(x)
        logits: Tensor = self.head(self.decay ** ages.clamp(min=0) * (ages >= 0) @ x)
        return logits


@pytest.mark.parametrize(
    ("decay", "named"), [(0.9, "gradients.module_not_called"), (1.0, "gradients.position_table_not_used")]
)
def test_a_table_of_positions_is_missed_where_nothing_else_tells_the_order(decay: float, named: str) -> None:
    subject = Subject(lambda config: TableLeftOver(config, decay))
    seen = dict(observe(subject, told("gradients.reach_every_parameter").values()))
    asked = ("gradients.module_not_called", "gradients.position_table_not_used")
    assert [id for id in asked if seen[id]] == [named]


def test_a_model_without_grouped_queries_is_tried_wide() -> None:
    def without(config: Any) -> nn.Module:
        if config.num_kv_heads != config.num_heads:
            raise NotImplementedError("as many heads of keys as of queries")
        return BASES["nanogpt"].subject().build(config)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = Patient(Subject(without), told("causality.edit")).lm()
    assert (lm.config.num_heads, lm.config.num_kv_heads, lm.config.max_seq_len) == (2, 2, 16)


class AlwaysDrops(nn.Module):
    """Its dropout is no part and knows no mode, and its probability is none of the configuration's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.embed, self.head = nn.Embedding(config.vocab_size, d), nn.Linear(d, config.vocab_size)

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        ids = input_ids if past_key_values is None else torch.cat((past_key_values[0], input_ids), 1)
        logits = self.head(F.dropout(self.embed(ids), 0.1).cumsum(1))[:, -input_ids.shape[1] :]
        return (logits, (ids,)) if use_cache else logits


def test_a_dropout_that_goes_on_is_nothing_that_is_remembered_and_no_leak() -> None:
    subject, checks = Subject(AlwaysDrops), {check.id: check for check in list_checks()}
    settings = Settings(PROFILES["quick"], shrink=False)
    failed = ("forward.deterministic", "batch.row_alone", "causality.edit", "gradients.accumulate")
    seen = dict(observe(subject, [verify_one(subject, checks[id], settings) for id in failed]))
    dropout = {"modes.dropout_is_told_none", "repair.no_dropout"}
    assert {id for id, answer in seen.items() if answer} == dropout
    assert {"state.old_weights_remembered", "state.earlier_call_matters", "batch.other_rows_matter"} <= seen.keys()


class DecaysTooLittle(AlwaysDrops):
    """On a cache, what is remembered decays by a step too little: no matter of positions, though they are counted."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        x, T = self.embed(input_ids), input_ids.shape[1]
        rate = torch.tensor(0.7, dtype=x.dtype)
        state = torch.zeros_like(x[:, 0]) if past_key_values is None else past_key_values[0]
        y, held = [], state
        for t in range(T):
            held = held * rate + x[:, t]
            y.append(held)
        less = torch.arange(T)
        out = torch.stack(y, 1) + state[:, None] * (rate**less - rate ** torch.tensor(range(1, T + 1)))[:, None]
        logits = self.head(out)
        return (logits, (held,)) if use_cache else logits


def test_a_repair_that_is_right_by_chance_after_one_token_is_not_believed() -> None:
    subject, check = Subject(DecaysTooLittle), next(c for c in list_checks() if c.id == "decode.cached_equals_full")
    failed = {check.id: verify_one(subject, check, Settings(PROFILES["quick"]))}
    ask = list_symptoms()["repair.positions_after_the_cache"].ask
    assert ask(Patient(subject, failed)) is False
    with mock.patch("diymodel.verify.symptoms.moved._mends_longer_ones", return_value=True):
        assert ask(Patient(subject, failed)) is True


class LastOnly(AlwaysDrops):
    """On a cache it gives the logits of the last position alone, as many do that only generate on it."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        ids = input_ids if past_key_values is None else torch.cat((past_key_values[0], input_ids), 1)
        logits = self.head(self.embed(ids).cumsum(1))
        return (logits[:, -1:], (ids,)) if use_cache else logits


def test_nothing_is_said_of_positions_whose_logits_are_not_given() -> None:
    asked = ("decode.chunk_sees_its_future", "decode.chunk_sees_next_token_only", "decode.chunk_loses_the_cached")
    patient = Patient(Subject(LastOnly), told("decode.chunks"))
    assert [list_symptoms()[id].ask(patient) for id in asked] == [None, None, None]


class FillsUp(nn.Module):
    """Rows are filled up to one length, as for a compiler that wants fixed shapes, and attention has no mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, self.longest = config.hidden_size, config.max_seq_len
        self.embed, self.qkv = nn.Embedding(config.vocab_size, d), nn.Linear(d, 3 * d)
        self.head = nn.Linear(d, config.vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        T = input_ids.shape[1]
        x = self.embed(F.pad(input_ids, (0, self.longest - T)))
        q, k, v = self.qkv(x).chunk(3, -1)
        logits: Tensor = self.head(x + (q @ k.mT).softmax(-1) @ v)[:, :T]
        return logits


def test_attention_over_rows_that_are_filled_up_is_attention() -> None:
    check = next(check for check in list_checks() if check.id == "causality.edit")
    subject = Subject(FillsUp)
    seen = dict(observe(subject, [verify_one(subject, check, Settings(PROFILES["quick"]))]))
    assert seen["repair.causal_attention"]
    assert not seen["leak.without_attention"]


@pytest.mark.parametrize("id", LIVE)
def test_symptoms_show_as_they_were_measured(id: str) -> None:
    bug = next(bug for bug in list_bugs() if bug.id == id)
    measured = next(found for found in SAMPLES if found.bug == id)
    subject, checks = bug.subject(), {check.id: check for check in list_checks()}
    settings = Settings(PROFILES["quick"], shrink=False)
    seen = dict(observe(subject, [verify_one(subject, checks[killer], settings) for killer in measured.killers]))
    assert seen == measured.symptoms


def test_a_module_that_raises_has_no_symptoms() -> None:
    subject = resolve(None)
    check = next(check for check in list_checks() if check.id == "causality.edit")
    passed = verify_one(subject, check, Settings(PROFILES["quick"]))
    assert dict(observe(subject, [passed])) == {}


def test_an_experiment_that_takes_too_long_is_left_out_and_the_others_go_on() -> None:
    def forever(_: Patient) -> bool:
        while True:
            pass

    subject = resolve(f"{EXAMPLES / 'broken_model.py'}:LM")
    found = [verify_one(subject, check, Settings(10)) for check in select_checks(["decode.cached_equals_full"])]
    expected = dict(observe(subject, found))
    first = next(id for id, shows in expected.items() if shows)
    slow = {**list_symptoms(), first: replace(list_symptoms()[first], ask=forever)}
    with (
        mock.patch("diymodel.verify.symptoms.list_symptoms", return_value=slow),
        mock.patch("diymodel.verify.symptoms._SECONDS", 3.0),
    ):
        assert dict(observe(subject, found)) == {id: shows for id, shows in expected.items() if id != first}


def test_what_was_found_before_an_experiment_crashes_is_kept() -> None:
    subject = resolve(f"{EXAMPLES / 'broken_model.py'}:LM")
    found = [verify_one(subject, check, Settings(10)) for check in select_checks(["decode.cached_equals_full"])]
    expected = list(observe(subject, found))
    before, (last, _) = dict(expected[:3]), expected[3]
    crashing = {**list_symptoms(), last: replace(list_symptoms()[last], ask=lambda _: os._exit(1))}
    with mock.patch("diymodel.verify.symptoms.list_symptoms", return_value=crashing):
        *_, findings = examine_isolated(subject, found)
    assert findings.symptoms == before
    assert findings.absent


def test_a_watched_trial_may_copy_its_module() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("table", torch.ones(2))
    with Overflows() as seen:
        copied = copy.deepcopy(module)
    assert torch.equal(copied.table, module.table)
    assert seen.first is None


@pytest.mark.parametrize("square", [Tensor.square, lambda x: x * x, lambda x: torch.addcmul(torch.zeros_like(x), x, x)])
def test_a_square_that_overflows_is_seen_however_it_is_written(square: Callable[[Tensor], Tensor]) -> None:
    with Overflows() as seen:
        square(torch.full((2,), 300.0, dtype=torch.float16))
    assert seen.first == "square"


def test_keys_that_a_later_step_turns_are_seen_in_the_cache() -> None:
    """lucidrains' local-attention: what the first call keeps is not turned yet, and what a step keeps is."""
    old = """        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = torch.arange(k.shape[2], device=x.device) <= position[:, None]
        keys, values = k"""
    new = """        q = rotate(q, position, self.theta)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = torch.arange(k.shape[2], device=x.device) <= position[:, None]
        turned = rotate(k, torch.arange(k.shape[2]), self.theta)
        k = k if past is None else turned
        keys, values = turned"""
    base = BASES["rotary"]
    assert base.source.count(old) == 1
    only = ("decode.cached_equals_full", "decode.long_row", "decode.session")
    report = check_causal_lm(base.subject(base.source.replace(old, new)), profile="quick", only=only)
    assert report.symptoms["cache.held_keys_are_turned"]
    assert report.diagnosis[0].bug == "cached-keys-rotated-again"
    assert not report.unexplained


@pytest.mark.parametrize("base", ["rotary", "rolling", "supplied", "statespace", "onmodule"])
def test_what_a_correct_step_changes_in_its_cache_is_no_turned_key(base: str) -> None:
    patient = Patient(BASES[base].subject(), told("decode.cached_equals_full"))
    assert list_symptoms()["cache.held_keys_are_turned"].ask(patient) is False


@pytest.mark.parametrize("base", ["writer", "scribe"])
def test_a_mode_that_is_not_restored_is_no_excuse_for_rows_that_stop_together(base: str) -> None:
    source = BASES[base].source
    for id in (
        f"mode-not-restored-{base}-generation.ignores_training_mode",
        f"eos-not-per-row-{base}-generation.eos_per_row",
    ):
        source = next(bug for bug in list_bugs() if bug.id == id).put_into(source)
    only = ("generation.ignores_training_mode", "generation.eos_per_row")
    report = check_causal_lm(BASES[base].subject(source), profile="quick", only=only)
    assert report.symptoms["modes.stops_rightly_with_dropout_0"] is False
    assert {found.bug for found in report.likely} == {"mode-not-restored", "eos-not-per-row"}


def test_experiments_are_on_a_wide_module_where_weights_are_always_tied() -> None:
    def tied(config: Any) -> nn.Module:
        if not config.tie_word_embeddings:
            raise NotImplementedError("tied alone")
        return BASES["rotary"].subject().build(config)

    small = {**CONFIG, "hidden_size": 2, "tie_word_embeddings": True}
    check = next(check for check in list_checks() if check.id == "decode.cached_equals_full")
    failure = Failure("told", (), small, {"config": small}, "")
    lm = Patient(Subject(tied), {check.id: Result(check, "failed", failure=failure)}).lm()
    assert (lm.config.hidden_size, lm.config.tie_word_embeddings) == (8, True)


@pytest.mark.parametrize(
    ("base", "bug", "shows"),
    [
        ("writer", None, (False, False)),
        ("scribe", None, (False, False)),
        ("writer", "eos-not-per-row", (True, False)),
        ("scribe", "eos-not-per-row", (False, True)),
    ],
)
def test_how_rows_fail_to_end_each_by_its_own(base: str, bug: str | None, shows: tuple[bool, bool]) -> None:
    found = [found for found in list_bugs() if (found.base, found.slug) == (base, bug)]
    subject = found[0].subject() if found else BASES[base].subject()
    patient, asked = (
        Patient(subject, told("generation.eos_per_row")),
        ("ends_with_another_row", "goes_on_after_its_end"),
    )
    assert tuple(list_symptoms()[f"generation.{id}"].ask(patient) for id in asked) == shows
