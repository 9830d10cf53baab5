"""The command line: what it does, its exit codes, and one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from diymodel import __version__
from diymodel.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from diymodel.cli import main
from diymodel.config import PRESETS, DIYConfig, TrainConfig
from diymodel.model import DIYForCausalLM
from diymodel.tokenizer import ByteTokenizer

TINY = ["--num-layers=1", "--hidden-size=16", "--num-heads=2", "--max-seq-len=32", "--steps=4", "--batch-size=2"]
TINY += ["--warmup-steps=1", "--log-every=1", "--eval-every=4", "--eval-batches=1", "--device=cpu", "--dtype=float32"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # for children: conftest.py does not reach them
TEXT = "Document one. " * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text: str) -> str:
    """A finished run directory."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    assert main(["train", text, "--out", out, *TINY]) == 0
    return out


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that could not start: exit code 2, one line on stderr, nothing on stdout."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("diymodel")
    return err


# --------------------------------------------------------------------------------------------------------------- help


def test_help_and_mistakes_need_no_torch() -> None:
    code = (
        "import sys; from diymodel.cli import main; "
        "codes = [main(argv) for argv in (['--help'], ['train', '--help'], ['generate', '--help'], ['train'], ['x'])]; "
        "print(codes, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("[0, 0, 0, 2, 2] False\n")


def test_every_setting_is_an_option_with_its_documentation_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    preset = PRESETS["default"]
    for config in (DIYConfig, TrainConfig):
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in shown
            assert field.metadata["doc"].partition(" (default")[0] in shown
    assert f"highest learning rate, reached after the warm-up (default: {TrainConfig.learning_rate})" in shown
    assert f"optimizer steps (default: {preset.train['steps']})" in shown
    assert "number of key/value heads; divides num_heads (default: num_heads)" in shown
    assert "number of distinct tokens (default: the tokenizer's)" in shown
    assert "--no-tie-word-embeddings" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diymodel {__version__}\n"


# -------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("command", [["verify", "--json"], ["verify", "--html"], ["bench", "decode", "--json"]])
def test_a_report_that_could_not_be_written_is_refused_before_the_work(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere/x cannot be written: there is no directory nowhere" in error_of([*command, "nowhere/x"], capsys)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_reports_what_was_found_and_is_no_success(
    stop: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    with mock.patch("diymodel.verify.command._progress", side_effect=lambda result: signal.raise_signal(stop)):
        assert main(["verify", "--only", "shape.*", "--profile", "quick", "--jobs", "1"]) == 130
    assert "interrupted before a verdict on shape.longest" in capsys.readouterr().out
    signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]


# -------------------------------------------------------------------------------------------------------------- train


def test_options_override_the_preset_and_the_tokenizer_sets_the_vocabulary(text: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--preset=quick", "--no-tie-word-embeddings", "--num-kv-heads=1", "--rms-norm-eps=0.01"]
    assert main(["train", text, "--out", str(out), *options, *TINY]) == 0
    checkpoint = read_checkpoint(out / "checkpoint.pt")
    quick = PRESETS["quick"]
    assert checkpoint.config == DIYConfig(
        vocab_size=258,
        pad_token_id=257,
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        max_seq_len=32,
        dropout=quick.model["dropout"],
        rms_norm_eps=0.01,
        tie_word_embeddings=False,
    )
    assert checkpoint.training is not None
    assert checkpoint.training["train_config"]["learning_rate"] == quick.train["learning_rate"]
    assert checkpoint.training["train_config"]["steps"] == 4


def test_resume_needs_no_settings_again_and_refuses_others(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main(["train", text, "--out", out, *TINY]) == 0
    assert "is there already" in error_of(["train", text, "--out", out, *TINY], capsys)
    assert main(["train", text, "--out", out, "--resume"]) == 0
    assert main(["train", text, "--out", out, "--resume", "--log-every=3"]) == 0
    assert "TrainConfig.seed was 0 and is 5 now" in error_of(
        ["train", text, "--out", out, "--resume", "--seed=5"], capsys
    )
    assert "num_layers was 1 and is 2 now" in error_of(
        ["train", text, "--out", out, "--resume", "--preset=quick"], capsys
    )
    assert "data was '1 documents" in error_of(["train", "--out", out, "--resume"], capsys)


def test_ctrl_c_saves_and_resume_finishes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    options = [*TINY, "--steps=100000"]
    # A shell may have started the tests with SIGINT ignored, and a child would inherit that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from diymodel.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", text, "--out", out, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(2)
            break
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    stopped = re.search(
        r"^stopped at step (\d+)/100000; saved in .*checkpoint\.pt; continue with --resume$", rest, re.M
    )
    assert stopped is not None
    training = read_checkpoint(Path(out, "checkpoint.pt")).training
    assert training is not None
    assert training["step"] == int(stopped[1]) >= 3
    assert "steps was 100000 and is 4 now" in error_of(["train", text, "--out", out, "--resume", "--steps=4"], capsys)


def test_overfit_proves_that_it_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--overfit", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "expected:  The cat sat on a mat\ngenerated: The cat sat on a mat\nlearned by heart: loss 0.00" in out


def test_overfit_exits_1_when_it_does_not_learn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--overfit", "--steps=1", "--device=cpu"]) == 1
    assert "NOT learned" in capsys.readouterr().out


def test_a_diverged_run_exits_1(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", text, "--out", str(tmp_path), *TINY, "--learning-rate=1e36", "--weight-decay=100"]) == 1
    assert capsys.readouterr().err.startswith("diymodel train: error: loss ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["train"], "say where the run goes with --out RUN"),
        (["train", "--out=x", "--steps=many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--out=x", "--steps=0"], "TrainConfig.steps=0: must be at least 1"),
        (["train", "--out=x", "--hidden-size=6"], "DIYConfig.hidden_size=6: not divisible by num_heads=4"),
        (["train", "--out=x", "--dropout=nan"], "DIYConfig.dropout=nan: must be in [0, 1)"),
        (["train", "--out=x", "--vocab-size=257", "--no-tie-word-embeddings"], "pad_token_id=257: must be a token id"),
        (["train", "--out=x", "--max-seq-len=1"], "max_seq_len=1"),
        (["train", "--out=x", "--preset=huge"], "invalid choice: 'huge'"),
        (["train", "--out=x", "--batching=random"], "invalid choice: 'random'"),
        (["train", "--out=x", "--device=gpu0"], "device='gpu0' cannot be used"),
        (["train", "--out=x", "--tokenizer=missing.json"], "there is no missing.json: expected a Hugging Face tok"),
        (["train", "--out=x", "missing.txt"], "there is no missing.txt: expected a text file, or a folder of them"),
        (["train", "--out=x", "--resume"], "nothing to resume"),
        (["train", "--overfit", "--out=x", "a.txt"], "leave out a.txt, --out"),
        (["train", "--overfit", "--dropout=2"], "DIYConfig.dropout=2.0"),
        (["train", "--overfit", "--max-seq-len=4"], "max_seq_len=4"),
        (["generate", "missing", "x"], "there is no missing: expected a directory that `diymodel train` wrote"),
        (["generate", ".", "x"], "neither checkpoint.pt nor config.json"),
        (["generate", ".", "x", "--compile", "--no-cache"], "--compile compiles the step on the cache"),
        (["generate", ".", "x", "--temperature=0", "--top-k=4"], "no effect at --temperature 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_2(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in error_of(argv, capsys)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------- generate


def generated(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", *argv]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s, seed \d+\n", err)
    return out


def test_a_run_directory_and_its_file_generate_the_same(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    from_directory = generated([run, "Doc", "--device=cpu"], capsys)
    assert from_directory.startswith("Doc")
    assert generated([f"{run}/checkpoint.pt", "Doc", "--device=cpu"], capsys) == from_directory
    assert generated([run, "Doc", "--device=cpu", "--no-cache"], capsys) == from_directory
    # one token, for which nothing is compiled: tests/test_compiled.py has the others
    one = [run, "Doc", "--device=cpu", "--max-new-tokens=1"]
    assert generated([*one, "--compile"], capsys) == generated(one, capsys)
    assert generated([run, "Doc", "--device=cpu", "--seed=1"], capsys) != from_directory


def test_it_prints_what_the_library_generates_and_fills_the_room(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ByteTokenizer()
    model = load_checkpoint(f"{run}/checkpoint.pt")
    prompt = torch.tensor([tokenizer.encode("Döc")])
    expected = model.generate(
        prompt, 28, temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3, eos_token_id=tokenizer.eos_id
    )
    options = ["--temperature=1.5", "--top-k=50", "--top-p=0.9", "--repetition-penalty=1.1", "--seed=3", "--device=cpu"]
    assert generated([run, "Döc", *options], capsys) == tokenizer.decode(expected[0].tolist()) + "\n"


def test_the_prompt_may_come_from_stdin(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generated([run, "Doc\n", "--max-new-tokens=5"], capsys)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Doc\n\n"))
    assert generated([run, "--max-new-tokens=5"], capsys) == expected
    terminal = io.StringIO("")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert "no PROMPT" in error_of(["generate", run], capsys)


def test_an_empty_prompt_begins_a_document(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(generated([run, "", "--max-new-tokens=5"], capsys)) > 1


def test_it_stops_at_the_end_of_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that always says the end: the token is counted, and has no text."""
    model = DIYForCausalLM(DIYConfig(vocab_size=258, num_layers=1, hidden_size=16, num_heads=2))
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()[ByteTokenizer.eos_id] = 1.0
    save_checkpoint(tmp_path / "m.pt", model, training={"tokenizer": {"kind": "bytes"}})
    assert main(["generate", str(tmp_path / "m.pt"), "ab", "--temperature=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "ab\n"
    assert err.startswith("1 tokens in ")


def test_too_many_tokens_are_refused_and_nothing_is_printed_before(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "at most 29 new tokens fit" in error_of(["generate", run, "Doc", "--max-new-tokens=30"], capsys)
    assert "max_new_tokens=-1" in error_of(["generate", run, "Doc", "--max-new-tokens=-1"], capsys)
    assert "seed=-1 must be in" in error_of(["generate", run, "Doc", "--seed=-1"], capsys)
    assert "the prompt has 32 tokens: no room" in error_of(["generate", run, "x" * 32], capsys)
    assert "temperature=-1.0" in error_of(["generate", run, "Doc", "--temperature=-1"], capsys)
    assert generated([run, "Doc", "--max-new-tokens=0"], capsys) == "Doc\n"


def test_a_checkpoint_without_tokenizer_or_a_damaged_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.pt"
    save_checkpoint(path, DIYForCausalLM(DIYConfig(num_layers=1, hidden_size=16, num_heads=2)))
    assert "has no tokenizer in it" in error_of(["generate", str(path), "x"], capsys)
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in error_of(["generate", str(path), "x"], capsys)


def test_a_hugging_face_directory_generates_with_its_own_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    from diymodel.checkpoint import save_pretrained

    vocabulary = {"<s>": 0, "<end>": 1, **{letter: i for i, letter in enumerate("abcdefgh", start=2)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "<end>"])
    tokenizer.decoder = tokenizers.decoders.Fuse()
    torch.manual_seed(0)
    model = DIYForCausalLM(DIYConfig(vocab_size=10, num_layers=1, hidden_size=16, num_heads=2, max_seq_len=12)).eval()
    save_pretrained(model, tmp_path)
    assert "no tokenizer.json" in error_of(["generate", str(tmp_path), "abc"], capsys)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    expected = model.generate(torch.tensor([[2, 3, 4]]), 9, eos_token_id=1)[0].tolist()
    letters = "".join("..abcdefgh"[i] for i in expected if i > 1)
    assert generated([str(tmp_path), "abc", "--temperature=0", "--device=cpu"], capsys) == letters + "\n"
    for content, message in (
        ("[]", "is not a JSON object"),
        ("{", "is damaged: it is not JSON"),
        ('{"eos_token": {"x": 1}}', """: eos_token is {"x": 1}, and must be a text or {"content": a text}"""),
        ('{"eos_token": 1}', ": eos_token is 1, and must be a text"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        said = error_of(["generate", str(tmp_path), "abc"], capsys)
        assert str(tmp_path / "tokenizer_config.json") in said
        assert message in said


def test_a_closed_pipe_is_no_traceback(run: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "diymodel", "generate", run, "Doc"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=ONE_THREAD,
        )
    finally:
        os.close(write_end)
    assert (process.returncode, process.stderr) == (1, "")
