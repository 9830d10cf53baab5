"""Figures, timing in turn, result files, comparisons and pictures of ``diymodel bench``."""

from __future__ import annotations

import copy
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from diymodel._machine import describe_machine
from diymodel.bench.compare import compare
from diymodel.bench.device import choose
from diymodel.bench.figures import Fit, Spread, ratios, seconds_text
from diymodel.bench.results import read_results, write_results
from diymodel.bench.shapes import SHAPES, parse_lengths, parse_shapes
from diymodel.bench.timing import Effort, Work, interleave, timed
from diymodel.cli import main
from diymodel.cost import num_parameters

CPU = torch.device("cpu")


def test_fit_and_spread() -> None:
    fit = Fit.of((1, 2, 4), (5, 40, 320))
    assert fit.exponent == pytest.approx(3)
    assert fit.local == pytest.approx([3, 3])
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)
    assert Spread.read({"median": 3, "q1": 2, "q3": 4}).text() == "3.00 [2.00–4.00]"
    assert ratios([2.0], [4.0]) == Spread(0.5, 0.5, 0.5)
    texts = [seconds_text(seconds) for seconds in (2655.4, 2.5, 0.0025, 2.5e-6)]
    assert texts == ["2655 s", "2.5 s", "2.5 ms", "2.5 us"]


def test_interleave_takes_turns_and_resets_before_each_round() -> None:
    log: list[str] = []
    works = {name: Work(lambda name=name: log.append(name), lambda: log.append("reset"), 2) for name in "ab"}
    rounds = interleave(works, CPU, Effort(rounds=3, fewest_rounds=3))
    assert {name: len(seconds) for name, seconds in rounds.items()} == {"a": 3, "b": 3}
    assert "".join(log[-18:]).replace("reset", "|") == "|aa|bb" * 3
    assert timed(lambda: log.append("c"), CPU) > 0


def test_shapes_and_lengths_are_found_or_refused() -> None:
    assert list(parse_shapes("S,T256")) == ["S", "T256"]
    with pytest.raises(ValueError, match="no shape 'XL'; there are T256, T, S, M, L"):
        parse_shapes("T,XL")
    assert num_parameters(SHAPES["S"]) < num_parameters(SHAPES["M"]) < num_parameters(SHAPES["L"])
    assert parse_lengths("--lengths", "64,32", 64) == [32, 64]
    for text, message in (("32", "at least two lengths, from 4 to 64"), ("32,65", "to 64"), ("3,x", "whole numbers")):
        with pytest.raises(ValueError, match=message):
            parse_lengths("--lengths", text, 64)


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    document = {"schema": 2, "benchmark": "decode", "spread": Spread(1, 2, 3), "machine": describe_machine(CPU)}
    write_results(path, document)
    before = path.read_bytes()
    assert read_results(path, "decode")["spread"] == {"median": 1, "q1": 2, "q3": 3}
    with pytest.raises(TypeError, match="Fraction does not belong in a results file"):
        write_results(path, {"a": [1] * 10_000, "z": Fraction(1, 3)})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="is no result that `diymodel bench peers` of schema 2 wrote"):
        read_results(path, "peers")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is no JSON"):
        read_results(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"results\.json: expected a file that `diymodel bench decode` wrote"):
        read_results(path, "decode")


def test_a_device_that_is_not_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="skipped, torch sees no CUDA device here"):
        choose("cuda", "float32")
    assert choose("cpu", "bfloat16") == (CPU, torch.bfloat16)


def decoded(exponent: float = 1.06) -> dict[str, Any]:
    """A small result of ``bench decode``, as a file holds it."""
    spread = {"median": 2.0, "q1": 1.5, "q3": 2.5}
    rows: list[dict[str, Any]] = []
    for length in (32, 64):
        way = {
            "step_seconds": {**spread, "median": length / 1000},
            "step_flops": 10 * length,
            "kv_bytes": 100 * length,
            "total_seconds": length**2 / 1000,
            "total_generated": length == 32,
        }
        rows.append({"length": length, "no_cache": way, "cached": dict(way), "ratios": {"no_cache/cached": spread}})
    fit = {"exponent": exponent, "local": [exponent]}
    return {
        "schema": 2,
        "benchmark": "decode",
        "subject": "diymodel",
        "dtype": "float32",
        "config": {"hidden_size": 16, "num_layers": 2},
        "lengths": [32, 64],
        "machine": {"cpu": "AMD", "gpu": None, "threads": 1},
        "cache": {"verdict": "constant", "reason": "because"},
        "rows": rows,
        "fits": {
            way: {"step_flops": fit, "total_flops": fit, "total_seconds": {"exponent": 9.0, "local": [9.0]}}
            for way in ("no_cache", "cached")
        },
    }


def test_what_is_exact_is_compared_exactly() -> None:
    same = compare(decoded(), decoded())
    assert (same.regressions, same.improvements, same.num_exact) == ([], [], 2 * 2 * 2 + 4)
    new = decoded(exponent=1.07)
    new["rows"][1]["cached"]["step_flops"] -= 1
    del new["rows"][0]["cached"]["kv_bytes"]
    found = compare(decoded(), new)
    assert found.regressions == [
        "rows length 32 cached kv_bytes is gone, it was 3,200",
        *(f"fits {way} {what} exponent: 1.06 → 1.07" for way in ("no_cache", "cached") for what in TOTALS),
    ]
    assert found.improvements == ["rows length 64 cached step_flops: 640 → 639"]


TOTALS = ("step_flops", "total_flops")


def test_times_are_shown_as_ratios_in_turn_and_judge_nothing() -> None:
    new = decoded()
    new["rows"][0]["ratios"]["no_cache/cached"] = {"median": 1.0, "q1": 0.9, "q3": 1.1}
    for row in new["rows"]:
        row["cached"]["step_seconds"] = {"median": 99.0, "q1": 99.0, "q3": 99.0}
    found = compare(decoded(), new)
    assert not found.regressions
    assert found.ratios == [
        "length 32 no_cache/cached: 2.00 [1.50–2.50] → 1.00 [0.90–1.10]  apart",
        "length 64 no_cache/cached: 2.00 [1.50–2.50] → 2.00 [1.50–2.50]  within their spread",
    ]
    assert "%" not in "\n".join(found.lines())


def test_a_cache_that_is_one_no_more_is_a_regression() -> None:
    new = decoded() | {"cache": {"verdict": "recomputes", "reason": "its cached step recomputes"}}
    assert compare(decoded(), new).regressions == ["the cache: constant → recomputes: its cached step recomputes"]


def test_different_things_are_not_compared() -> None:
    with pytest.raises(ValueError, match="OLD has dtype 'float32' and NEW 'bfloat16': they measured different things"):
        compare(decoded(), decoded() | {"dtype": "bfloat16"})


def test_the_command_compares_and_says_so_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, exponent in zip(paths, (1.06, 1.07), strict=True):
        write_results(path, decoded(exponent))
    assert main(["bench", "compare", str(paths[0]), str(paths[0])]) == 0
    assert main(["bench", "compare", *map(str, paths)]) == 1
    assert main(["bench", "compare", *map(str, reversed(paths))]) == 0
    assert main(["bench", "compare", str(paths[0]), __file__]) == 2
    printed = capsys.readouterr()
    assert "regression: fits cached total_flops exponent: 1.06 → 1.07" in printed.out
    assert "test_bench_results.py is no JSON" in printed.err


def test_the_picture_is_in_two_languages(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gpu = copy.deepcopy(decoded())
    gpu["machine"]["gpu"] = "NVIDIA X, 80 GiB"
    files = [tmp_path / name for name in ("cpu.json", "gpu.json")]
    for file, document in zip(files, (decoded(), gpu), strict=True):
        file.write_text(json.dumps(document), encoding="utf-8")
    for lang, labels in (
        ("en", ("without cache", "hidden 16 × 2 layers", "hollow", "∝ T³", "NVIDIA X, float32", "FLOPs ∝ T¹·⁰⁶")),
        ("zh", ("有缓存", "hidden 16 × 2 层", "空心", "∝ T³", "词元数 T")),
    ):
        picture = tmp_path / f"{lang}.svg"
        assert main(["bench", "plot", *map(str, files), "--out", str(picture), "--lang", lang]) == 0
        text = picture.read_text(encoding="utf-8")
        assert [label for label in labels if label not in text] == []
    again = tmp_path / "again.svg"
    main(["bench", "plot", *map(str, files), "--out", str(again), "--lang", "zh"])
    assert again.read_bytes() == picture.read_bytes()


def test_the_picture_reads_on_light_and_on_dark() -> None:
    from diymodel.bench import plot

    def luminance(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for color in (plot.INK, plot.FAINT, *(style["color"] for style in plot.WAYS.values())):
        assert re.fullmatch("#[0-9a-f]{6}", color)
        for ground in ("#ffffff", "#0d1117"):
            assert contrast(color, ground) >= 3, f"{color} on {ground}: {contrast(color, ground):.2f}"


def test_chinese_pixels_need_a_font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import font_manager

    from diymodel.bench.plot import draw

    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.raises(ValueError, match=r"no font here has Chinese characters.*write an \.svg"):
        draw([decoded()], tmp_path / "picture.png", "zh")
