"""The benchmarks' own code, at the tiniest sizes: FLOPs are checked, times only looked at for being there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import against_transformers, decode_scaling, plot
from benchmarks.decode_scaling import count_step, count_steps, integral, overtakes, total, total_flops
from benchmarks.measure import Effort, Fit, Spread, Work, describe_machine, interleave, ratios, write_results
from benchmarks.shapes import SHAPES, build, check_same_logits, llama_like, parse_shapes
from diymodel import DIYConfig
from diymodel.cost import decode_flops, kv_bytes_per_token, num_parameters, prefill_flops

CPU = torch.device("cpu")
TINY = DIYConfig(vocab_size=31, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, max_seq_len=128, dropout=0.0)
DOUBLINGS = (64, 128, 256, 512, 1024, 2048)


@pytest.fixture(scope="module")
def exponents() -> dict[str, dict[str, Fit]]:
    """FLOP exponents of hidden 512 × 8 layers over 64 … 2048."""
    steps = {way: count_steps(SHAPES["S"], DOUBLINGS, way == "cached") for way in ("no_cache", "cached")}
    totals = {(way, t): total_flops(costs, t) for way, costs in steps.items() for t in DOUBLINGS}
    kinds = ("flops", "linear_flops", "attention_flops")
    return {
        way: {kind: Fit.of(DOUBLINGS, [totals[way, t][kind] for t in DOUBLINGS]) for kind in kinds} for way in steps
    }


def test_without_cache_a_generation_is_quadratic_and_its_attention_cubic(exponents: Mapping[str, Any]) -> None:
    fit = exponents["no_cache"]
    assert 2.0 < fit["flops"].exponent < 2.2
    assert fit["linear_flops"].exponent == pytest.approx(2.0, abs=0.01)
    assert fit["attention_flops"].exponent == pytest.approx(3.0, abs=0.01)
    assert fit["flops"].local == sorted(fit["flops"].local), "the longer, the more attention weighs"


def test_with_cache_a_generation_is_linear_and_its_attention_quadratic(exponents: Mapping[str, Any]) -> None:
    fit = exponents["cached"]
    assert 1.0 < fit["flops"].exponent < 1.1
    assert fit["linear_flops"].exponent == pytest.approx(1.0, abs=0.01)
    assert fit["attention_flops"].exponent == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("name", ["T", "L"])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_counted_flops_are_the_formulas(name: str, length: int) -> None:
    config = SHAPES[name]
    cached, uncached = (count_step(config, length, use_cache) for use_cache in (True, False))
    assert cached.flops == decode_flops(config, length - 1)
    assert uncached.flops == prefill_flops(config, length, logits_to_keep=1)
    assert cached.kv_bytes == length * kv_bytes_per_token(config)
    assert uncached.kv_bytes == 0


def test_half_types_halve_the_cache() -> None:
    half, single = (count_step(TINY, 5, True, dtype).kv_bytes for dtype in (torch.bfloat16, torch.float32))
    assert 2 * half == single


def test_a_total_is_the_sum_of_all_its_steps() -> None:
    costs = {t: step.flops for t, step in count_steps(TINY, [9], use_cache=False).items()}
    assert total(costs, 9) == sum(prefill_flops(TINY, t, logits_to_keep=1) for t in range(1, 10))


def test_a_total_of_what_is_no_polynomial_is_refused() -> None:
    with pytest.raises(ValueError, match="the step at 8 positions costs 512 FLOPs and not"):
        total({t: t**3 for t in (1, 2, 3, 8)}, 8)


def test_attention_overtakes_at_six_times_the_width() -> None:
    config = DIYConfig(vocab_size=1, hidden_size=48, num_heads=4, intermediate_size=128)
    assert overtakes(count_steps(config, [], use_cache=True)) == pytest.approx(6 * 48, rel=0.01)


def test_integral_is_exact_on_straight_lines() -> None:
    assert integral({2: 4.0, 4: 8.0}, 4) == 4 + 4 + 6 + 8  # the step at 1 counts as the one at 2


def test_fit_and_spread() -> None:
    fit = Fit.of((1, 2, 4), (5, 40, 320))
    assert fit.exponent == pytest.approx(3)
    assert fit.local == pytest.approx([3, 3])
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)
    assert ratios([2.0], [4.0]) == Spread(0.5, 0.5, 0.5)


def test_interleave_takes_turns_and_resets_before_each_round() -> None:
    log: list[str] = []
    works = {name: Work(lambda name=name: log.append(name), lambda: log.append("reset"), 2) for name in "ab"}
    rounds = interleave(works, CPU, Effort(rounds=3, fewest_rounds=3))
    assert {name: len(seconds) for name, seconds in rounds.items()} == {"a": 3, "b": 3}
    assert "".join(log[-18:]).replace("reset", "|") == "|aa|bb" * 3


def test_steps_of_a_round_continue_one_cache_around_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(TINY)
    seen: list[int] = []
    forward = model.forward

    def watched(ids: torch.Tensor, **arguments: Any) -> Any:
        logits, past = forward(ids, **arguments)
        seen.append(past[0][1])
        return logits, past

    monkeypatch.setattr(model, "forward", watched)
    work = decode_scaling.cached_step(model, torch.ones(1, 32, dtype=torch.int64))
    for _ in range(2):
        work.reset()
        del seen[:]
        for _ in range(work.most_calls):
            work.run()
        assert seen == list(range(28, 36))


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, {"spread": Spread(1, 2, 3), "machine": describe_machine(CPU)})
    before = path.read_bytes()
    assert json.loads(before)["spread"] == {"median": 1, "q1": 2, "q3": 3}
    with pytest.raises(TypeError, match="Fraction does not belong in a results file"):
        write_results(path, {"a": [1] * 10_000, "z": Fraction(1, 3)})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_shapes_are_found_by_name() -> None:
    assert list(parse_shapes("S,T256")) == ["S", "T256"]
    with pytest.raises(ValueError, match="no shape 'XL'; there are T256, T, S, M, L"):
        parse_shapes("T,XL")
    assert num_parameters(SHAPES["S"]) < num_parameters(SHAPES["M"]) < num_parameters(SHAPES["L"])


@pytest.mark.parametrize("config", [TINY, SHAPES["T256"]])
def test_peer_of_the_same_weights_gives_the_same_logits(config: DIYConfig) -> None:
    pytest.importorskip("transformers")
    model = build(config)
    peer = llama_like(model)
    assert check_same_logits(model, peer, length=16) < 1e-5
    attention = peer.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    with pytest.raises(ValueError, match="the two models' logits differ"):
        check_same_logits(model, peer, length=16)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of that name, for the scripts' options."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_transformers_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "results.json"
    options = ["--shapes", "tiny", "--train", "tiny", "--dtype", dtype, "--quick", "--json", str(path)]
    against_transformers.main(options)
    document = last_line(capsys)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert document["shapes"]["tiny"]["figures"].keys() == against_transformers.TITLES.keys()
    for figure in document["shapes"]["tiny"]["figures"].values():
        assert figure["ours"]["median"] > 0
        assert figure["ratio"]["q1"] <= figure["ratio"]["median"] <= figure["ratio"]["q3"]


@pytest.mark.usefixtures("tiny")
def test_against_transformers_without_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_transformers, "transformers_missing", lambda: "transformers is not installed")
    against_transformers.main(["--shapes", "tiny", "--quick"])
    document = last_line(capsys)
    assert document["peer_skipped"] == "transformers is not installed"
    assert set(document["shapes"]["tiny"]["figures"]["decode_step"]) == {"ours", "rounds"}
    assert "training_step" not in document["shapes"]["tiny"]["figures"]


@pytest.mark.usefixtures("tiny")
def test_decode_scaling_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    decode_scaling.main(["--shape", "tiny", "--lengths", "8,16,32", "--quick", "--json", str(path)])
    document = last_line(capsys)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert [row["length"] for row in document["rows"]] == [8, 16, 32]
    assert document["rows"][-1]["no_cache"]["total_flops"] > document["rows"][-1]["cached"]["total_flops"]
    assert document["rows"][-1]["cached"]["total_generated"]

    pytest.importorskip("matplotlib")
    document["rows"][-1]["no_cache"]["total_generated"] = False
    path.write_text(json.dumps(document), encoding="utf-8")
    picture = tmp_path / "picture.svg"
    plot.main([str(path), str(path), "--out", str(picture)])
    text = picture.read_text(encoding="utf-8")
    for label in ("without cache", "有缓存", "hidden 16 × 2 layers", "hollow", "∝ T³"):
        assert label in text


@pytest.mark.usefixtures("tiny")
def test_what_is_too_long_to_generate_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shape", "tiny", "--lengths", "8,16", "--quick", "--affordable", "0"]
    decode_scaling.main(options)
    printed = capsys.readouterr().out
    assert "* not generated: the integral of the measured steps" in printed
    assert not json.loads(printed.splitlines()[-1])["rows"][0]["cached"]["total_generated"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (against_transformers, ["--shapes", "T,X"], "no shape 'X'"),
        (against_transformers, ["--train", "X"], "no shape 'X'"),
        (decode_scaling, ["--lengths", "32"], "at least two, from 4 to 4080"),
        (decode_scaling, ["--lengths", "32,4096"], "at least two, from 4 to 4080"),
        (decode_scaling, ["--lengths", "32,many"], "invalid literal"),
        (decode_scaling, ["--shape", "S,T"], "one shape"),
        (plot, [__file__, "--out", "x.svg"], "test_smoke.py"),
    ],
)
def test_bad_options_are_refused(
    script: Any, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
def test_scripts_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    decode_scaling.main(["--shape", "tiny", "--lengths", "8,16", "--device", "cuda", "--dtype", "bfloat16", "--quick"])
    assert last_line(capsys)["machine"]["gpu"]
    pytest.importorskip("transformers")
    against_transformers.main(["--shapes", "tiny", "--device", "cuda", "--quick"])
    assert last_line(capsys)["shapes"]["tiny"]["figures"]["training_step"]["ratio"]["median"] > 0
