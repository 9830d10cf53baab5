"""Prompts of several lengths in one list, as Meta's generate takes them: every row goes on after its own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from tests.test_generating import Pairs, found, subject

CHECKS = {check.id: check for check in list_checks()}
PADDED = CHECKS["generation.padded_prompt"]


class Lists(Pairs):
    """Given a list a row; what comes back is a list a row with the prompt."""

    def generate(self, prompt_tokens: Any, max_gen_len: int) -> Any:
        lengths = [len(row) for row in prompt_tokens]
        ids = torch.zeros(len(lengths), max(lengths) + max_gen_len, dtype=torch.int64)
        for row, prompt in zip(ids, prompt_tokens, strict=True):
            row[: len(prompt)] = torch.as_tensor(prompt)
        given = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        for at in range(min(lengths), ids.shape[1]):
            new = self(ids[:, :at])[:, -1].argmax(-1)
            ids[:, at] = self.chosen(given[:, at], ids[:, at], new)
        return self.returned([row[: n + max_gen_len].tolist() for row, n in zip(ids, lengths, strict=True)], lengths)

    def chosen(self, given: Tensor, prompt: Tensor, new: Tensor) -> Tensor:
        return torch.where(given, prompt, new)

    def returned(self, rows: list[list[int]], lengths: list[int]) -> Any:
        return rows


class NewTokensAlone(Lists):
    def returned(self, rows: list[list[int]], lengths: list[int]) -> Any:
        return [row[n:] for row, n in zip(rows, lengths, strict=True)]


class OneTensor(Lists):
    """Shorter rows are filled up."""

    def returned(self, rows: list[list[int]], lengths: list[int]) -> Any:
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


class WritesOverPrompts(Lists):
    def chosen(self, given: Tensor, prompt: Tensor, new: Tensor) -> Tensor:
        return new


class OneLength(Lists):
    def generate(self, prompt_tokens: Any, max_gen_len: int) -> Any:
        return super().generate(torch.tensor(prompt_tokens), max_gen_len)


@pytest.mark.parametrize("factory", [Lists, NewTokensAlone, OneTensor])
def test_rows_of_several_lengths_are_held_to_themselves_alone(factory: Any) -> None:
    assert found(factory).ragged
    result = verify_one(subject(factory), PADDED, Settings(10))
    assert result.status == "passed", result


def test_a_prompt_that_is_written_over_is_seen() -> None:
    result = verify_one(subject(WritesOverPrompts), PADDED, Settings(10))
    assert result.failure is not None, result
    assert "without padding, real lengths" in result.failure.message


def test_who_takes_one_length_alone_is_not_asked_for_more() -> None:
    assert found(OneLength).missing["generate_padded"] == "generate has no attention_mask and no seq_lengths"


class Ends(Lists):
    """Each row up to its own end token; one that stands in a prompt ends nothing."""

    def generate(self, prompt_tokens: Any, max_gen_len: int, eos_id: int = -1) -> Any:
        rows = super().generate(prompt_tokens, max_gen_len)
        return [self.ended(row, len(prompt), eos_id) for row, prompt in zip(rows, prompt_tokens, strict=True)]

    def ended(self, row: list[int], length: int, eos_id: int) -> list[int]:
        return row[: length + row[length:].index(eos_id)] if eos_id in row[length:] else row


class EndsWhileItReads(Ends):
    """As GRPO-Zero did: an end token ends a row from where the shortest prompt of all ends."""

    def generate(self, prompt_tokens: Any, max_gen_len: int, eos_id: int = -1) -> Any:
        shortest = min(map(len, prompt_tokens))
        ended = [eos_id in prompt[shortest:] for prompt in prompt_tokens]
        rows = super().generate(prompt_tokens, max_gen_len, eos_id)
        return [row[: len(p)] if end else row for row, p, end in zip(rows, prompt_tokens, ended, strict=True)]


@pytest.mark.parametrize(("factory", "status"), [(Ends, "passed"), (EndsWhileItReads, "failed")])
def test_an_end_token_behind_where_shorter_prompts_end_ends_nothing(factory: Any, status: str) -> None:
    assert found(factory).ragged
    result = verify_one(subject(factory), CHECKS["generation.eos_in_prompt"], Settings(20))
    assert result.status == status, result
    assert result.failure is None or re.search(r"beside shorter ones of \d, must go on as", result.failure.message)
