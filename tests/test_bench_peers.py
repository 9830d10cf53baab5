"""``diymodel bench peers``, ``prefill`` and ``training`` at the tiniest sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diymodel import DIYConfig
from diymodel.bench import peers
from diymodel.bench.models import build
from diymodel.bench.peers import PEERS, PeerMissing, Room
from diymodel.bench.peers.rival import logit_difference, require
from diymodel.bench.peers.transformers import llama_like
from diymodel.bench.shapes import SHAPES
from tests.test_bench_decode import TINY, run

OURS = {"ours", "ours_unchecked", "floor"}
OURS_ALONE = "gpt_fast_like,torch_cat,uncached,nanogpt"


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.filterwarnings("ignore")  # of the packages themselves
def test_peers_on_our_weights_give_our_logits(name: str, rows: int) -> None:
    model = build(DIYConfig(vocab_size=40, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, dropout=0.0))
    try:
        rival = PEERS[name](model, Room(rows, 96), False)
    except PeerMissing as missing:
        pytest.skip(str(missing))
    with torch.inference_mode():
        if rival.same_weights:
            assert logit_difference(model, rival, rows) < 1e-5
        else:
            logits, state = rival.prefill(torch.ones(rows, 5, dtype=torch.int64))
            assert logits.shape[::2] == (rows, 40)
            assert rival.step(torch.ones(rows, 1, dtype=torch.int64), state)[0].shape[::2] == (rows, 40)


def test_a_peer_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model = build(TINY)
    broken = llama_like(model)
    attention = broken.model.layers[0].self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    monkeypatch.setattr(peers.transformers, "llama_like", lambda model: broken)
    with pytest.raises(ValueError, match="the two models' logits differ"):
        logit_difference(model, peers.dynamic(model, Room(1, 96), False))


def test_what_is_not_installed_is_skipped_with_the_reason() -> None:
    with pytest.raises(PeerMissing, match="no_such_package is not installed"):
        require("no_such_package")


@pytest.mark.usefixtures("_tiny")
def test_peers_from_end_to_end_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    options = ("--shapes", "tiny", "--peers", OURS_ALONE, "--prompt", "8", "--json", str(path))
    _, document = run(capsys, "peers", *options)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    found = document["shapes"]["tiny"]
    assert found["own_weights"] == ["nanogpt"]
    assert all(difference < 1e-5 for difference in found["largest_logit_difference"].values())
    assert found["figures"].keys() == {"decode_step", "generate", "construct"}
    for ratio in found["figures"]["decode_step"]["ratios"].values():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    printed, again = run(capsys, "peers", *options, "--resume")
    assert "tiny: kept" in printed
    assert again["shapes"] == document["shapes"]
    from diymodel.cli import main

    assert main(["bench", "peers", *options[:-4], "--prompt", "9", "--json", str(path), "--resume", "--quick"]) == 2
    assert "has prompt 8 and this run 9" in capsys.readouterr().err


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_transformers(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    pytest.importorskip("transformers")
    options = ("--peers", "transformers,transformers_static", "--prompt", "8", "--batch", "2", "--dtype", dtype)
    _, document = run(capsys, "peers", "--shapes", "tiny", *options)
    seconds = document["shapes"]["tiny"]["figures"]["decode_step"]["seconds"]
    assert seconds.keys() - {"ours_bfloat16", "ours_int8"} == OURS | {"transformers", "transformers_static"}
    assert document["shapes"]["tiny"]["figures"]["generate"]["seconds"].keys() == {"ours", "transformers"}


@pytest.mark.usefixtures("_tiny")
def test_prefill_and_training_without_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(model: Any) -> Any:
        raise PeerMissing("transformers is not installed")

    monkeypatch.setattr(peers, "llama_like", missing)
    printed, document = run(capsys, "prefill", "--shape", "tiny", "--lengths", "8,16,32")
    assert "transformers: skipped, transformers is not installed" in printed
    assert [row["length"] for row in document["rows"]] == [8, 16, 32]
    assert document["fits"]["flops"]["exponent"] > 1
    printed, document = run(capsys, "training", "--shape", "tiny", "--batch", "2", "--length", "8")
    assert "transformers: skipped" in printed
    assert document["base"] == "ours float32"
    assert document["steps"].keys() == {"ours float32", "ours bfloat16"}


@pytest.mark.usefixtures("_tiny")
def test_training_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    _, document = run(capsys, "training", "--shape", "tiny", "--batch", "2", "--length", "8")
    assert document["ratios"].keys() == {
        f"transformers float32/{name}" for name in ("ours float32", "ours bfloat16", "transformers bfloat16")
    }
