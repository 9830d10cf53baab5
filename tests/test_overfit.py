"""The smallest loop learns, and says when it did not."""

from __future__ import annotations

import dataclasses

import pytest

from diymodel.config import OVERFIT, DIYConfig, TrainConfig
from diymodel.overfit import overfit
from diymodel.tokenizer import ByteTokenizer


def silent(line: str) -> None:
    """No progress lines."""


def overfit_settings() -> tuple[DIYConfig, TrainConfig]:
    return DIYConfig(vocab_size=258, **OVERFIT.model), TrainConfig(**OVERFIT.train, warmup_steps=0, device="cpu")


def test_overfit_learns_its_sequence_by_heart() -> None:
    result = overfit(*overfit_settings(), log=silent)
    assert result.learned
    assert result.loss < 0.01
    assert result.generated == result.expected == "The cat sat on a mat"
    assert len(ByteTokenizer().encode(result.expected)) == 20
    assert result.seconds < 30


def test_overfit_says_when_it_did_not_learn() -> None:
    model_config, train_config = overfit_settings()
    result = overfit(model_config, dataclasses.replace(train_config, steps=2), log=silent)
    assert result.steps == 2
    assert not result.learned
    with pytest.raises(ValueError, match="vocab_size=257 is too small"):
        overfit(dataclasses.replace(model_config, vocab_size=257), train_config)
