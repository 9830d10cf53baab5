"""``diymodel bench`` on our own model and on strangers', at the tiniest sizes: times are looked at for being there."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel import DIYConfig
from diymodel.bench import compiled, decode
from diymodel.bench.bandwidth import matrix_vector_products, read_bytes
from diymodel.bench.caches import ConcatenatedDecoder, MaskedDecoder
from diymodel.bench.compiled import engine_decoder, missing
from diymodel.bench.decode import cached_step
from diymodel.bench.decoders import Benched, OwnDecoder, greedy
from diymodel.bench.models import build
from diymodel.bench.shapes import SHAPES
from diymodel.bench.timing import Effort, Work, interleave
from diymodel.checkpoint import save_pretrained
from diymodel.cli import main
from diymodel.verify import Subject
from diymodel.zoo.base import BASES
from tests.examples.my_model import LM

CPU = torch.device("cpu")
TINY = DIYConfig(vocab_size=31, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, max_seq_len=128, dropout=0.0)
EXAMPLES = Path(__file__).parent / "examples"
IDS = torch.randint(31, (1, 12), generator=torch.Generator().manual_seed(0))


class Recomputing(LM):  # type: ignore[misc]
    """Its cache is the tokens so far, all of which it computes again."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        seen = input_ids if past_key_values is None else torch.cat((past_key_values, input_ids), 1)
        logits = super().forward(seen)[:, -input_ids.shape[1] :]
        return (logits, seen) if use_cache else logits


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of that name."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a measurement prints, and the document that is its last line."""
    assert main(["bench", *arguments, "--quick"]) == 0
    printed = capsys.readouterr().out
    document: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return printed, document


@pytest.mark.parametrize("kind", ["ours", "concatenated", "masked"])
def test_every_cache_gives_the_logits_of_the_whole(kind: str) -> None:
    model = build(TINY).double()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3)
        make: dict[str, Any] = {
            "ours": OwnDecoder,
            "concatenated": ConcatenatedDecoder,
            "masked": lambda model: MaskedDecoder(model, 20),
        }
        decoder, expected = make[kind](model), model(IDS)
        logits, past = decoder.extend(IDS[:, :5], None)
        for end in range(5, 12):
            assert (logits[:, -1] - expected[:, end - 1]).abs().max() < 1e-12
            branch, _ = decoder.extend(IDS[:, end : end + 1], past)
            logits, past = decoder.extend(IDS[:, end : end + 1], past)
            assert torch.equal(branch, logits), "a prefix is continued twice"
        assert (decoder.whole(IDS)[:, -1] - logits[:, -1]).abs().max() < 1e-12


def test_the_step_that_is_compiled_and_captured_is_this_one() -> None:
    eager, wrapped = MaskedDecoder(build(TINY), 20), []

    def wrap(step: Any) -> Any:
        def counted(ids: Tensor, position: Tensor) -> Tensor:
            wrapped.append(int(position))
            logits: Tensor = step(ids, position)
            return logits

        return counted

    decoder = MaskedDecoder(build(TINY), 20, wrap=wrap)
    with torch.no_grad():
        assert torch.equal(greedy(decoder, IDS[:, :3], 4, True), greedy(eager, IDS[:, :3], 4, True))
    assert wrapped == [3, 4, 5]
    assert missing("masked_graph", CPU) == "CUDA graphs need a CUDA device"
    assert missing("masked_compiled", CPU) is None


class _Graph:
    """A CUDA graph's part without CUDA: what was called while it was captured is called again by replay."""

    captured: list[Any] = []  # noqa: RUF012

    def replay(self) -> None:
        self.captured[-1]()


def test_a_captured_step_gets_its_inputs_by_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    logits = torch.zeros(1)

    def step(ids: Tensor, position: Tensor) -> Tensor:
        calls.append((ids, position))
        _Graph.captured.append(lambda: logits.copy_(10 * ids[0] + position))
        return logits

    stream: Any = type("", (), {"wait_stream": lambda self, other: None})
    for name, fake in {
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = compiled._captured(step)
    for ids, position in ((1, 2), (3, 4)):
        assert replay(torch.tensor([[ids]]), torch.tensor([position])).item() == 10 * ids + position
    assert len(calls) == 4, "three times before, once for the capture"
    assert calls[0][0] is calls[-1][0], "the graph reads where the inputs are put"


def test_a_round_on_cuda_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    work = Work(lambda: log.append("run"), lambda: log.append("reset"), 2)
    interleave({"a": work}, torch.device("cuda"), Effort(rounds=1, fewest_rounds=1, round_seconds=100))
    assert log[-8:] == ["reset", "wait", "event", "run", "event", "run", "event", "wait"]


@pytest.mark.gpu
def test_engines_agree_on_a_gpu() -> None:
    model = build(TINY).to("cuda")
    expected = greedy(OwnDecoder(model), IDS.cuda(), 6, True)
    for engine in ("masked_compiled", "masked_graph", "masked_compiled_graph"):
        with torch.no_grad():
            assert torch.equal(greedy(engine_decoder(engine, model, 24), IDS.cuda(), 6, True), expected)


def test_greedy_is_generate() -> None:
    model = build(TINY)
    for use_cache in (True, False):
        assert torch.equal(greedy(OwnDecoder(model), IDS, 8, use_cache), model.generate(IDS, 8))


def test_steps_of_a_round_continue_one_cache_around_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = OwnDecoder(build(TINY))
    seen: list[int] = []
    extend = decoder.extend

    def watched(ids: Tensor, past: Any) -> Any:
        logits, past = extend(ids, past)
        seen.append(past[0][1])
        return logits, past

    monkeypatch.setattr(decoder, "extend", watched)
    with torch.no_grad():
        work = cached_step(decoder, torch.ones(1, 32, dtype=torch.int64))
        assert work.reset is not None
        for again in range(2):
            del seen[:]
            work.reset()
            for _ in range(work.most_calls):
                work.run()
            assert seen == ([] if again else [26]) + [*range(27, 36)], "branching computes no prefix a second time"


def test_what_a_step_must_read() -> None:
    model = build(TINY)
    table = model.model.embed_tokens.weight
    assert read_bytes(model, 100) == sum(p.nbytes for p in model.parameters()) - table.nbytes + table[0].nbytes + 100
    matrix_vector_products(model)()


@pytest.mark.usefixtures("_tiny")
def test_our_model_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    printed, document = run(capsys, "decode", "--shape", "tiny", "--lengths", "8,16,32", "--json", str(path))
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert [row["length"] for row in document["rows"]] == [8, 16, 32]
    last = document["rows"][-1]
    assert last["no_cache"]["total_flops"] > last["cached"]["total_flops"]
    assert last["cached"]["total_generated"]
    assert last.keys() >= {"no_cache", "cached", "concatenated", "masked", "floor"}
    assert last["ratios"].keys() == {f"{way}/cached" for way in ("no_cache", "concatenated", "masked", "floor")}
    assert document["cache"]["verdict"] == "constant"
    assert document["counted_on"] == "meta"
    for text in ("theory 3.00", "masked buffer", "of the memory-bandwidth bound", "6 × hidden_size"):
        assert text in printed
    assert "not generated" not in printed.splitlines()[6]


@pytest.mark.usefixtures("_tiny")
def test_what_is_too_long_to_generate_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "tiny", "--lengths", "8,16", "--prompt", "4", "--affordable", "0")
    printed, document = run(capsys, "decode", *options)
    assert "* not generated: the sum of the measured steps" in printed
    assert not document["rows"][0]["cached"]["total_generated"]


@pytest.mark.usefixtures("_tiny")
def test_a_strangers_model(capsys: pytest.CaptureFixture[str]) -> None:
    subject = f"{EXAMPLES / 'my_model.py'}:LM"
    _, document = run(capsys, "decode", subject, "--shape", "tiny", "--lengths", "8,16")
    assert document["subject"] == subject
    assert document["cache"]["verdict"] == "constant"
    assert document["rows"][0]["cached"]["kv_bytes"] == 8 * 2 * 2 * 16 * 4
    assert set(document["rows"][0]) == {"length", "no_cache", "cached", "floor", "ratios"}


@pytest.mark.usefixtures("_tiny")
def test_a_model_without_a_cache_shows_one_column(capsys: pytest.CaptureFixture[str]) -> None:
    printed, document = run(capsys, "decode", f"{EXAMPLES / 'nano_gpt.py'}:GPT", "--shape", "tiny", "--lengths", "8,16")
    assert document["cache"] == {"verdict": "none", "reason": "forward has no past_key_values"}
    assert "cached" not in document["rows"][0]
    assert "with cache: skipped, forward has no past_key_values" in printed
    tokens = 2 * 8 * (4 * 16 + 8 * 16) * 16 * 2 + 2 * 31 * 16
    assert document["rows"][0]["no_cache"]["step_linear_flops"] == tokens, "the head at the last position only"


def test_a_cached_step_that_recomputes_is_shown_as_such() -> None:
    plan = decode.Plan([16, 32, 64], 1, CPU, torch.float32, Effort.quick(), 0.0)
    rows: list[Any] = []
    found = decode.measure(Benched(Subject(Recomputing), TINY), plan, rows.append)
    assert found["cache"]["verdict"] == "recomputes"
    assert "its cached step recomputes: products with weights take" in found["cache"]["reason"]
    assert [row["length"] for row in rows] == [16, 32, 64]
    assert found["fits"]["cached"]["total_linear_flops"].exponent > 1.8


@pytest.mark.parametrize("base", ["fastlike", "supplied", "onmodule", "startpos", "resettable", "intermediates", "hub"])
def test_every_kind_of_cache_is_measured(base: str) -> None:
    if base == "supplied" and not hasattr(torch.nn.functional, "rms_norm"):
        pytest.skip("this model of the zoo needs torch 2.4")
    plan = decode.Plan([8, 16], 1, CPU, torch.float32, Effort.quick(), 1.0)
    found = decode.measure(Benched(BASES[base].subject(), TINY), plan, lambda row: None)
    assert found["cache"]["verdict"] == "constant"
    assert found["rows"][0]["cached"]["total_generated"]
    assert found["rows"][0]["cached"]["kv_bytes"]


def test_lengths_that_a_subject_refuses_are_left_out_or_named() -> None:
    class Short(LM):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
            if input_ids.shape[1] > 20:
                raise ValueError("at most 20")
            return super().forward(input_ids, past_key_values, use_cache)

    subject = Benched(Subject(Short), TINY)
    plan = decode.Plan([8, 16, 32], 1, CPU, torch.float32, Effort.quick(), 0.0)
    assert decode.count(subject, plan, ["no_cache", "cached"])[1] == [8, 16]
    plan = decode.Plan([8, 32], 1, CPU, torch.float32, Effort.quick(), 0.0)
    with pytest.raises(ValueError, match=r"does not take 32 positions \(ValueError: at most 20\)"):
        decode.count(subject, plan, ["no_cache", "cached"])


@pytest.mark.usefixtures("_tiny")
def test_a_model_of_transformers_by_name_and_by_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    _, named = run(capsys, "decode", "hf:llama", "--shape", "tiny", "--lengths", "8,16")
    save_pretrained(build(TINY), tmp_path / "model")
    _, opened = run(capsys, "decode", str(tmp_path / "model"), "--lengths", "8,16")
    _, ours = run(capsys, "decode", "--shape", "tiny", "--lengths", "8,16")
    assert opened["shape"] is None
    for found in (named, opened):
        for way in ("no_cache", "cached"):
            flops = [row[way]["step_flops"] for row in found["rows"]]
            assert flops == [row[way]["step_flops"] for row in ours["rows"]], "the same architecture"
        assert found["rows"][0]["cached"]["kv_bytes"] == ours["rows"][0]["cached"]["kv_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--lengths", "32"), "at least two lengths, from 4 to 4080"),
        (("decode", "--lengths", "32,4096"), "at least two lengths, from 4 to 4080"),
        (("decode", "--lengths", "32,many"), "whole numbers"),
        (("decode", "--engines", "warp"), "--engines warp: there are masked_compiled"),
        (("decode", "--prompt", "0"), "at least one token"),
        (("decode", "no_such_file.py:LM"), "no_such_file.py"),
        (("peers", "--shapes", "T,X"), "no shape 'X'"),
        (("peers", "--peers", "gpt5"), "there are transformers"),
        (("peers", "--resume"), "name it with --json"),
        (("training", "--batch", "0"), "at least one row of two tokens"),
        (("plot", __file__, "--out", "x.svg"), "test_bench_decode.py is no JSON"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("_tiny")
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "tiny", "--lengths", "8,16", "--device", "cuda", "--dtype", "bfloat16")
    _, document = run(capsys, "decode", *options)
    assert document["machine"]["gpu"]
    assert not document["skipped"]
    assert document["rows"][0]["masked_compiled_graph"]["step_seconds"]["median"] > 0
