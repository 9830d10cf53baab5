"""DIYConfig and TrainConfig refuse what cannot be, and say which field, which value and why."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from diymodel import DIYConfig, TrainConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "hidden_size=10: not divisible by num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4: not divisible by num_kv_heads=3"),
        ({"hidden_size": 12, "num_heads": 4}, "hidden_size=12: the head size hidden_size / num_heads = 3 is odd"),
        ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
        ({"num_layers": 0}, "num_layers=0: must be at least 1"),
        ({"hidden_size": -4}, "hidden_size=-4: must be at least 1"),
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len=0: must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads=0: must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0: must be at least 1"),
        ({"dropout": -0.1}, r"dropout=-0.1: must be in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout=nan: must be in \[0, 1\)"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: must be a finite number above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: must be a finite number above 0"),
        ({"rope_theta": math.inf}, "rope_theta=inf: must be a finite number above 0"),
        ({"pad_token_id": 6400}, r"pad_token_id=6400: must be a token id in \[0, vocab_size=6400\)"),
        ({"pad_token_id": -1}, r"pad_token_id=-1: must be a token id"),
    ],
)
def test_impossible_architectures_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DIYConfig.{message}"):
        DIYConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"grad_accumulation": 0}, "grad_accumulation=0: must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be a finite number above 0"),
        ({"grad_clip": math.nan}, "grad_clip=nan: must be a finite number above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be a finite number, 0 or above"),
        ({"min_lr_ratio": 1.5}, r"min_lr_ratio=1.5: must be in \[0, 1\]"),
        ({"beta2": 1.0}, r"beta2=1.0: must be in \[0, 1\)"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps=6: longer than the whole run of steps=5"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
    ],
)
def test_impossible_runs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig.{message}"):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": "10"}, "vocab_size='10': expected int, got str"),
        ({"vocab_size": True}, "vocab_size=True: expected int, got bool"),
        ({"num_layers": 2.0}, "num_layers=2.0: expected int, got float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected bool, got int"),
        ({"num_kv_heads": "2"}, "num_kv_heads='2': expected int or NoneType, got str"),
    ],
)
def test_wrong_types_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"DIYConfig.{message}"):
        DIYConfig(**fields)


def test_a_word_that_is_no_choice_is_refused() -> None:
    with pytest.raises(TypeError, match=r"TrainConfig.batching='both': expected 'packed' or 'padded'"):
        TrainConfig(batching="both")  # type: ignore[arg-type]


def test_a_whole_number_is_a_float() -> None:
    config = DIYConfig(rope_theta=500000)
    assert config.rope_theta == 500000.0
    assert type(config.rope_theta) is float


def test_derived_sizes_are_filled_in() -> None:
    config = DIYConfig(hidden_size=256, num_heads=4)
    assert config.num_kv_heads == config.kv_heads == 4
    assert config.intermediate_size == config.mlp_size == 688
    assert config.head_size == 64


@pytest.mark.parametrize(
    "config", [DIYConfig(num_kv_heads=2, tie_word_embeddings=True), TrainConfig(batching="padded")]
)
def test_round_trip_through_json(config: DIYConfig | TrainConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="DIYConfig has no field 'n_layers'; the nearest is 'num_layers'"):
        DIYConfig.from_dict({"n_layers": 3})


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DIYConfig().dropout = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("config", [DIYConfig(), TrainConfig()])
def test_every_field_is_documented(config: DIYConfig | TrainConfig) -> None:
    assert all(field.metadata["doc"] for field in dataclasses.fields(config))


def test_importing_the_config_needs_no_torch() -> None:
    code = "import sys; from diymodel import DIYConfig, TrainConfig; DIYConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
