"""What is said of a module that cannot be called: how it was tried, where it failed, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diymodel.verify import Subject, SubjectError
from diymodel.verify.subject import resolve
from tests.test_adapters import Tiny, causal
from tests.test_probing import CachesFirst


class WholeLengthOnly(Tiny):
    """Without targets it does not even begin."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if tokens.shape[1] < self.positions.num_embeddings:
            raise ValueError("too short")
        return self.run(tokens, causal)


class OneTokenOnly(Tiny):
    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != 1:
            raise ValueError("only one token at a time")
        return self.run(tokens, causal)


class NoWay(Tiny):
    def forward(self, tokens: Tensor, mask: Tensor | None = None, past: Any = None, targets: Any = None) -> Tensor:
        if targets is None:
            raise ValueError("not this way")
        return self.missing


class InBlocks(Tiny):
    """Blockwise attention, or a recurrence in chunks."""

    def __init__(self, config: Any, block: int) -> None:
        super().__init__(config)
        self.block = block

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] % self.block:
            raise ValueError("whole blocks only")
        return self.run(input_ids, causal)


class LooksFarBack(Tiny):
    """Shorter rows crash, as where a fixed number of tokens is cut off."""

    def forward(self, input_ids: Tensor) -> Tensor:
        far = input_ids.narrow(1, 0, input_ids.shape[1] - 8)
        return self.run(input_ids, causal) + 0 * far.sum()


class NeverReady(CachesFirst):
    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        raise RuntimeError("ready" if self.keys is not None else "not ready")


class Misspelt(Tiny):
    def forward(self, tokens: Tensor, mask: Tensor | None = None, past: Any = None) -> Tensor:
        return self.hed(self.embed(tokens))


HERE = r"\(.*test_uncallable.py:\d+\)"
SIZES = "vocab_size=16, num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, max_seq_len=16"
GIVEN = f"it was given 3 rows of 4 tokens, and built with {SIZES}; "
FUNCTION = "name a function config -> module instead, whose forward"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            WholeLengthOnly,
            f"forward failed on token ids and targets: ValueError: too short {HERE}; {GIVEN}"
            f"all 16 tokens are taken: {FUNCTION} pads to max_seq_len and cuts the logits",
        ),
        (
            partial(InBlocks, block=8),
            f"forward failed on token ids: ValueError: whole blocks only {HERE}; {GIVEN}"
            f"lengths that are multiples of 8 alone are taken: {FUNCTION} pads behind to one and cuts the logits",
        ),
        (
            partial(InBlocks, block=2),
            f"^forward failed on 3 tokens: ValueError: whole blocks only {HERE}; "
            f"lengths that are multiples of 2 alone are taken: {FUNCTION} pads behind to one and cuts the logits",
        ),
        (
            OneTokenOnly,
            f"forward failed on token ids: ValueError: only one token at a time {HERE}; {GIVEN}"
            f"one token at a time is taken: {FUNCTION} feeds them singly",
        ),
        (
            NoWay,
            f"forward failed on token ids: ValueError: not this way {HERE}; {GIVEN}"
            rf"with targets: AttributeError: .* 'missing' {HERE}; "
            rf"{FUNCTION}\(tokens\) returns logits \(batch, seq, vocab\), or say how it is called: "
            r"Subject\(factory, causal='mask', always_cached=True, new_cache=lambda module, config, rows: …\)$",
        ),
        (
            Misspelt,
            rf"forward failed on token ids: AttributeError: 'Misspelt' object has no attribute 'hed'.* {HERE}; {GIVEN}"
            "however it is called, it fails there$",
        ),
        (
            LooksFarBack,
            rf"forward failed on token ids: RuntimeError: .*length must be non-negative.* {HERE}; {GIVEN}"
            f"all 16 tokens are taken: {FUNCTION} pads to max_seq_len and cuts the logits",
        ),
        (
            NeverReady,
            f"token ids: RuntimeError: not ready {HERE}; {GIVEN}on a cache made first: RuntimeError: ready {HERE}; ",
        ),
    ],
)
def test_a_module_that_cannot_be_called_is_told_how_it_was_tried_and_what_to_write(
    module: Callable[[Any], nn.Module], message: str
) -> None:
    with pytest.raises(SubjectError, match=message):
        _ = Subject(module).convention


class Lost(Tiny):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("inv_freq", torch.full((config.hidden_size,), torch.nan), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(input_ids, causal) + self.inv_freq.sum()


def test_a_buffer_that_makes_everything_nan_is_named() -> None:
    with pytest.raises(SubjectError, match=r"^the buffer inv_freq holds NaN as the module is built, and so do all"):
        _ = Subject(Lost).convention


def test_a_constructor_that_fails_is_told_where() -> None:
    def build(config: Any) -> nn.Module:
        raise KeyError("rope")

    with pytest.raises(SubjectError, match=rf"build\(config\) failed: KeyError: 'rope' {HERE}"):
        _ = Subject(build).convention


def test_a_bare_assert_is_shown_itself(tmp_path: Path) -> None:
    path = tmp_path / "whole.py"
    path.write_text(
        "from torch import nn\n\nclass LM(nn.Module):\n    def __init__(self, config):\n        super().__init__()\n"
        "        self.embed = nn.Embedding(16, 16)\n\n    def forward(self, x):\n        assert x.shape[1] == 5\n",
        encoding="utf-8",
    )
    with pytest.raises(SubjectError, match=r"token ids: AssertionError: assert x.shape\[1\] == 5 \(.*whole.py:9\); "):
        _ = resolve(f"{path}:LM").convention
