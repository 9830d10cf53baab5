"""The harness as its users meet it: verdicts, reports, replay, bad subjects, the command and the pytest plugin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from diymodel import DIYConfig
from diymodel.cli import main
from diymodel.verify import Report, Subject, SubjectError, check_causal_lm, list_checks, parametrize_with_checks
from diymodel.verify.explain import title
from diymodel.verify.importing import import_named
from diymodel.verify.options import PROFILES
from diymodel.verify.registry import select_checks
from diymodel.verify.report import Result, Status
from diymodel.verify.runner import replay, run_checks
from diymodel.verify.settings import Settings
from diymodel.verify.subject import resolve

# A small rotary model with a tuple cache, as somebody would write it from memory, and the line where a bug goes.
EXAMPLES = Path(__file__).parent / "examples"
MODEL = (EXAMPLES / "my_model.py").read_text(encoding="utf-8")
POSITION = "torch.arange(P, P + T, device=input_ids.device)"
CACHED = "decode.cached_equals_full"


def write_model(path: Path, position: str = POSITION) -> str:
    assert MODEL.count(POSITION) == 1
    path.write_text(MODEL.replace(POSITION, position), encoding="utf-8")
    return f"{path}:LM"


@pytest.fixture
def healthy(tmp_path: Path) -> str:
    return write_model(tmp_path / "healthy_lm.py")


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """The classic: positions restart at 0 in decode."""
    return write_model(tmp_path / "broken_lm.py", "torch.arange(T, device=input_ids.device)")


@pytest.mark.usefixtures("few_trials")
def test_a_strangers_model_passes_and_what_it_lacks_is_said(healthy: str) -> None:
    report = check_causal_lm(healthy, profile="quick")
    assert report.verdict == "passed", report.to_text()
    skipped = {result.check.id: result.reason for result in report.results if result.status == "skipped"}
    assert skipped["padding.right_changes_nothing"] == "forward has no attention_mask and no seq_lengths"
    assert skipped["loss.value"] == "forward has no labels"


def test_a_planted_bug_is_found_shrunk_named_and_replayed(broken: str) -> None:
    report = check_causal_lm(broken, profile="quick", only=["decode.*"])
    assert {CACHED, "decode.chunks", "decode.session"} <= {result.check.id for result in report.failed}
    first = next(result for result in report.failed if result.check.id == CACHED)
    failure = first.failure
    assert failure is not None
    assert failure.likely_causes[0] == "position-restarts-in-decode"
    assert (failure.config["num_layers"], failure.config["num_heads"]) == (1, 1)
    assert len(failure.values["tokens"]) == 1
    assert len(failure.values["tokens"][0]) == 2

    again = replay(broken, first.check, failure.values)
    assert again.failure is not None
    assert again.failure.message == failure.message


def test_our_own_model_goes_by_a_name_so_that_its_failures_replay() -> None:
    report = check_causal_lm("diymodel", profile="quick", only=iter(["shape.logits"]))
    assert [result.status for result in report.results] == ["passed"]
    assert report.subject == check_causal_lm(None, profile="quick", only=["shape.logits"]).subject == "diymodel"


@pytest.mark.usefixtures("few_trials")
def test_the_same_seed_gives_the_same_report(broken: str) -> None:
    def run() -> dict[str, Any]:
        document = check_causal_lm(broken, profile="quick", seed=7, only=["decode.c*", "causality.*"]).to_dict()
        del document["seconds"]
        for check in document["checks"]:
            del check["seconds"]
        return document

    assert run() == run()


def test_an_expected_failure_does_not_count_and_one_that_passes_is_told(broken: str) -> None:
    expected = {CACHED: "known", "decode.chunks": "known", "shape.logits": "once"}
    report = check_causal_lm(broken, profile="quick", only=list(expected), expected_failures=expected)
    assert report.verdict == "passed"
    assert {result.check.id: (result.status, result.reason) for result in report.results} == {
        CACHED: ("expected_failure", "known"),
        "decode.chunks": ("expected_failure", "known"),
        "shape.logits": ("passed", "it was expected to fail: once"),
    }


def test_an_exception_in_the_subject_fails_the_check_with_its_own_traceback(tmp_path: Path) -> None:
    path = tmp_path / "raising_lm.py"
    path.write_text(
        MODEL.replace(POSITION, "torch.arange(T, device=input_ids.device) + P if T < 3 else self.missing"),
        encoding="utf-8",
    )
    with pytest.raises(SubjectError, match="forward failed on token ids: AttributeError"):
        check_causal_lm(f"{path}:LM", profile="quick", only=["shape.logits"])
    path.write_text(
        MODEL.replace(POSITION, "torch.arange(T, device=input_ids.device) + P if T != 7 else self.missing"),
        encoding="utf-8",
    )
    (result,) = check_causal_lm(f"{path}:LM", profile="standard", only=["shape.logits"]).failed
    assert result.failure is not None
    assert "AttributeError" in result.failure.message
    assert "self.missing" in (result.failure.traceback or "")
    assert "hypothesis" not in (result.failure.traceback or "")


def test_a_configuration_the_factory_refuses_is_skipped_and_counted() -> None:
    own = Subject()

    def one_layer_only(config: Any) -> Any:
        if config.num_layers > 1:
            raise NotImplementedError("one layer only")
        from diymodel import DIYForCausalLM

        return DIYForCausalLM(config)

    assert own.name == "Subject"
    report = check_causal_lm(one_layer_only, profile="quick", only=["shape.logits"])
    assert report.verdict == "passed"
    assert report.refused
    assert f"{len(report.refused)} configurations were refused" in report.to_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["decode.cached_equal_full"]}, f"no check matches .*; the nearest is '{CACHED}'"),
        ({"skip": ["nothing*"]}, r"no check matches 'nothing\*'"),
        ({"step": "9"}, "no check belongs to step '9': steps are 1 to 5"),
        ({"profile": "slow"}, "profile='slow': must be one of quick, standard, thorough"),
        (
            {"expected_failures": {"decode.branches": "x"}},
            "'decode.branches' is expected to fail, and no check that runs is called so; the nearest is",
        ),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_causal_lm(**arguments)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "LM", "there is no file"),
        ("import nothing_like_it", "LM", "does not import: ModuleNotFoundError"),
        (MODEL, "Lm", "has no 'Lm'; it has LM"),
        ("LM = 3", "LM", "is a int: expected a factory"),
        ("from torch import nn\nLM = nn.Linear(1, 1)", "LM", "is a built module: name the class"),
        ("LM = lambda config: 3", "LM", r"returned int: expected an nn.Module"),
        ("def LM(config): raise KeyError('x')", "LM", r"LM\(config\) failed: KeyError: 'x' \(.*:1\)$"),
        (
            "def LM(config): raise ValueError('odd')",
            "LM",
            r"failed: ValueError: odd .*; a factory refuses sizes by NotImpl",
        ),
        ("def LM(config): assert 1 == 2", "LM", r"failed: AssertionError: .*, or rounds them, as hidden_size, to"),
        ("def LM(config): raise NotImplementedError('never')", "LM", "refused every configuration .* never"),
        ("from torch import nn\nLM = lambda config: nn.Embedding(16, 4)", "LM", r"gave logits of shape|no logits"),
        ("LM = lambda config: None", "LM", "returned NoneType: expected an nn.Module"),
        ("import sys\nsys.exit(0)", "LM", "ends the program while it is imported: .*__main__"),
        ("LM = 3 +", "LM", "does not import: SyntaxError: invalid syntax"),
        ("class LM: pass", "LM", r"LM\(config\) returned LM: expected an nn.Module; "),
        (
            "def build(config, data): pass",
            "build",
            r"failed: TypeError: .*; config has vocab_size, .*its argument data is not the name of a size",
        ),
        (
            "def build(data, kiwi, banana): pass",
            "build",
            r"its arguments data, kiwi and banana are not names of sizes that are known here: give them defaults",
        ),
        (
            "def build(config): config.n_quux",
            "build",
            r"no attribute 'n_quux' \(.*:1\); config has vocab_size, num_layers, ",
        ),
        ("def built(config): pass", "build", "has no 'build'; the nearest is 'built'"),
        (
            "from torch import nn\nclass LM(nn.Module):\n    def __init__(self, config): super().__init__()",
            "LM",
            r"forward takes no arguments: expected forward\(input_ids",
        ),
        (
            MODEL.replace("input_ids, past", "input_ids, image, depth, past"),
            "LM",
            "forward needs image, depth, which is none of the arguments that the harness knows",
        ),
        (
            MODEL.replace("else self.head(x)", "else None"),
            "LM",
            "forward returned NoneType: expected logits",
        ),
        (
            MODEL.replace("else self.head(x)", "else self.head(x[:, -2:])"),
            "LM",
            r"gave logits of shape \(3, 2, 16\): expected \(3, 4, 16\)",
        ),
    ],
)
def test_a_bad_subject_is_one_clear_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, name: str, message: str
) -> None:
    path = tmp_path / "subject.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SubjectError, match=message):
        check_causal_lm(f"{path}:{name}", profile="quick")
    assert main(["verify", f"{path}:{name}", "--profile", "quick"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diymodel verify: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lm", "'lm' names no model: write path/to/file.py:ClassName, package.module:ClassName, hf:MODEL_TYPE or a"),
        ("models/lm", "there is no directory models/lm: write path/to/file.py:ClassName, or a directory with"),
        ("nowhere.py", "there is no file nowhere.py"),
        ("nowhere.py:LM", "there is no file nowhere.py"),
        ("a_file.py", "a_file.py names a file: write a_file.py:ClassName, or a_file.py:function"),
        ("no_such_package.lm:LM", "no_such_package.lm does not import: ModuleNotFoundError"),
        ("", "'' names no model"),
    ],
)
def test_a_subject_that_is_not_there_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file.py").write_text("", encoding="utf-8")
    with pytest.raises(SubjectError, match=re.escape(message)):
        check_causal_lm(spec)


def test_a_module_in_the_working_directory_is_found_and_a_subject_in_it_replays_by_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "lm_beside.py", "torch.arange(T, device=input_ids.device)")
    with (tmp_path / "lm_beside.py").open("a", encoding="utf-8") as file:
        file.write("\n\nfrom diymodel.verify import Subject\nsubject = Subject(LM, 'mine')\n")
    report = check_causal_lm("lm_beside:subject", profile="quick", only=[CACHED])
    assert report.subject == "mine", "as its author calls it"
    (result,) = report.failed
    assert result.failure is not None
    assert result.failure.reproduce.startswith("diymodel verify lm_beside:subject --only ")


def test_a_class_that_is_handed_over_replays_by_its_file(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, name = broken.rpartition(":")
    found = import_named(broken)
    monkeypatch.chdir(Path(path).parent)
    (result,) = check_causal_lm(found, profile="quick", only=[CACHED]).failed
    assert result.failure is not None
    assert result.failure.reproduce.startswith(f"diymodel verify {Path(path).name}:{name} --only ")

    def local(config: DIYConfig) -> Any:
        return found(config)

    (result,) = check_causal_lm(local, profile="quick", only=[CACHED]).failed
    assert result.failure is not None
    assert result.failure.reproduce.startswith("diymodel verify path/to/file.py:local --only ")


def test_a_module_that_rejects_every_configuration_is_told_so_with_its_own_message(tmp_path: Path) -> None:
    path = tmp_path / "narrow.py"
    build = "def build(config):\n    if config.max_seq_len < 16: raise NotImplementedError('at least 16 positions')\n"
    path.write_text(MODEL + build + "    return LM(config)\n", "utf-8")
    with pytest.raises(SubjectError, match=r"refused every configuration that was drawn, .*: at least 16 positions"):
        check_causal_lm(f"{path}:build", profile="quick", only=["causality.edit"])


@pytest.mark.parametrize("refused", ["config.hidden_size % 64", "config.head_size % 8"])
def test_a_factory_that_refuses_small_widths_is_given_those_that_it_took(refused: str, tmp_path: Path) -> None:
    path = tmp_path / "wide.py"
    build = f"def build(config):\n    if {refused}: raise NotImplementedError('kernels')\n"
    path.write_text(MODEL + build + "    return LM(config)\n", "utf-8")
    report = check_causal_lm(f"{path}:build", profile="quick", only=["causality.edit"])
    assert (report.verdict, report.results[0].examples) == ("passed", 10)


def test_an_unknown_transformers_type_names_the_nearest() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SubjectError, match="no causal language model of type 'lama'; the nearest is 'llama'"):
        check_causal_lm("hf:lama")


def test_the_command_prints_writes_and_exits(broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    options = ["--profile", "quick", "--only", "decode.c*", "--json", str(report), "--html", str(page)]
    assert main(["verify", broken, *options]) == 1
    text = capsys.readouterr().out
    assert "Most likely cause: position-restarts-in-decode" in text
    assert "\033" not in text
    document = json.loads(report.read_text(encoding="utf-8"))
    assert document["schema"] == 1
    assert document["verdict"] == "failed"
    failed = next(check for check in document["checks"] if check["id"] == CACHED)
    assert failed["status"] == "failed"
    assert failed["failure"]["max_abs_diff"] > failed["failure"]["tolerance"]
    assert "position-restarts-in-decode" in page.read_text(encoding="utf-8")

    values = json.dumps(failed["failure"]["values"])
    assert main(["verify", broken, "--only", CACHED, "--replay", values]) == 1
    again = capsys.readouterr().out
    assert all(half in again for half in failed["failure"]["message"].split(", saw "))


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["skipped"], "inconclusive"),
        (["skipped", "inconclusive"], "inconclusive"),
        (["skipped", "passed"], "passed"),
        (["inconclusive", "expected_failure"], "passed"),
        (["skipped", "error"], "failed"),
    ],
)
def test_nothing_is_passed_where_no_check_came_to_a_verdict(statuses: list[Status], verdict: str) -> None:
    results = [Result(check, status) for check, status in zip(list_checks(), statuses, strict=False)]
    assert Report("x", results=results).verdict == verdict


def test_a_run_of_nothing_but_skipped_checks_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{EXAMPLES / 'nano_gpt.py'}:GPT"
    assert main(["verify", spec, "--profile", "quick", "--only", CACHED]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("inconclusive: 1 skipped; ")


def test_reports_go_where_the_command_was_given_whatever_the_subject_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    spec = write_model(tmp_path / "wanders.py")
    with (tmp_path / "wanders.py").open("a", encoding="utf-8") as file:
        file.write("\n\nimport os\nos.chdir('elsewhere')\n")
    options = ["--profile", "quick", "--only", "shape.logits", "--json", "r.json", "--html", "r.html"]
    assert main(["verify", spec, *options]) == 0
    assert {path.name for path in tmp_path.glob("r.*")} == {"r.json", "r.html"}


def test_list_and_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list_checks())
    assert main(["list", "--lang", "zh"]) == 0
    for line, check in zip(capsys.readouterr().out.splitlines(), list_checks(), strict=True):
        assert line.startswith(f"{check.step}  {check.id} ")
        assert title(check, "zh") in line
        assert ("需要" in line, "可选" in line) == (bool(check.needs), check.optional)
    assert main(["explain", CACHED, "--lang", "zh"]) == 0
    assert "含义" in capsys.readouterr().out
    assert main(["explain", "decode.cached"]) == 2


def test_checks_come_in_the_order_of_the_roadmap() -> None:
    steps = [check.step for check in list_checks()]
    assert steps == sorted(steps)
    assert {check.id for check in select_checks(step="3.2")} == {c.id for c in list_checks() if c.step == "3.2"}


def run_pytest(folder: Path, *arguments: str) -> tuple[dict[str, int], str]:
    """How many tests passed, failed, …, and what was printed.

    In a process of its own, and without pytest's pytester: that forgets the modules that a test imported, and torch
    cannot import its compiler twice.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    printed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout
    counts = re.findall(r"(\d+) (passed|failed|skipped|xfailed|error)", printed.splitlines()[-1])
    return {outcome: int(count) for count, outcome in counts}, printed


def test_pytest_lm_gives_the_same_verdicts(tmp_path: Path, broken: str) -> None:
    outcomes, printed = run_pytest(tmp_path, "--lm", broken, "--lm-profile", "quick", "-k", "decode.ca")
    settings = Settings(PROFILES["quick"], shrink=False)
    expected = Counter(result.status for result in run_checks(resolve(broken), select_checks(["decode.ca*"]), settings))
    assert outcomes == expected
    assert re.search(r"^lm: .*dtype float64.*profile quick.*seed 0", printed, re.MULTILINE)
    assert "Most likely cause: position-restarts" in printed


def test_pytest_lm_refuses_a_device_that_cannot_be_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--lm", "diymodel", "--lm-device", "banana"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert run.stderr.startswith("ERROR: --lm-device: device='banana': ")
    assert run.stderr.strip().count("\n") == 0


def test_parametrize_with_checks(tmp_path: Path, broken: str) -> None:
    content = f"""
from diymodel.verify import parametrize_with_checks

@parametrize_with_checks([{broken!r}], expected_failures={{"{CACHED}": "positions restart"}})
def test_model(lm, check):
    check(lm)
"""
    (tmp_path / "test_it.py").write_text(content, encoding="utf-8")
    outcomes, _ = run_pytest(tmp_path, "-k", "decode.cached_equals or row_alone")
    assert outcomes == {"passed": 1, "xfailed": 1}
    with pytest.raises(ValueError, match=rf"no check is called '{CACHED}s'.*{CACHED}"):
        parametrize_with_checks([broken], expected_failures={f"{CACHED}s": "positions restart"})


def test_a_choice_that_leaves_nothing_to_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing is left to run: only=.*decode.*step='1'"):
        check_causal_lm(only=["decode.*"], step="1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "nonsense"), "device='nonsense': "),
        (("--check-seconds", "0"), "check_seconds=0 must be above 0"),
        (("--check-seconds", "inf"), "check_seconds=inf must be above 0 and at most 1e+06 seconds"),
        (("--time-budget", "nan"), "time_budget=nan must be above 0"),
        (("--only", CACHED, "--replay", "[]"), "--replay takes the JSON object that the report printed, got []"),
        (("--only", CACHED, "--replay", "{}", "--json", "x.json"), "leave out --json and --html"),
        (("--only", CACHED, "--replay", "{}", "--dtype", "float32"), "leave out --dtype"),
        (("--only", CACHED, "--step", "1"), "nothing is left to run"),
        (("--json", "."), ". cannot be written: it is a directory"),
        (("--device", "meta"), "device='meta' cannot be used: it holds shapes and no values"),
        (("--json", "report", "--html", "./report"), "report is named for two files"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "diymodel", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch knows CUDA")
def test_cuda_is_refused_by_a_torch_without_it() -> None:
    with pytest.raises(ValueError, match="was built without CUDA"):
        check_causal_lm(device="cuda", only=["shape.logits"])


def test_the_plugin_does_not_import_torch() -> None:
    code = "import sys, diymodel.verify.plugin; sys.exit('torch' in sys.modules or 'hypothesis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_report_keeps_what_was_interrupted() -> None:
    report = Report("x", 0, "quick", "2.13", "cpu", "float64", interrupted="interrupted before shape.logits")
    assert report.to_text().splitlines()[-1].endswith("0.0 s; interrupted before shape.logits")


@pytest.mark.usefixtures("few_trials")
def test_a_nanogpt_like_model_needs_no_adapter_code() -> None:
    report = check_causal_lm(f"{EXAMPLES / 'nano_gpt.py'}:GPT", profile="quick")
    assert report.verdict == "passed", report.to_text()
    skipped = {result.check.id: result.reason for result in report.results if result.status == "skipped"}
    assert skipped["decode.cached_equals_full"] == "forward has no past_key_values"
    assert skipped["padding.right_changes_nothing"] == "forward has no attention_mask and no seq_lengths"
    assert not {"loss.value", "causality.edit", "training.overfits_a_tiny_batch"} & skipped.keys()
