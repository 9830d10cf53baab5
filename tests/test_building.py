"""A class is told its sizes by the names of its own, and one that has sizes of its own keeps them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diymodel.config import DIYConfig
from diymodel.verify import Subject, SubjectError, check_causal_lm
from diymodel.verify.calling.building import SIZE_NAMES, ByNames
from diymodel.verify.importing import import_named

CONFIG = DIYConfig(
    vocab_size=11, num_layers=3, hidden_size=12, num_heads=2, num_kv_heads=1, intermediate_size=7, max_seq_len=9
)
SHAPES = "shape.*"


class Bag(nn.Module):
    """Each token sees the sum of those up to itself, weighted by where they stand."""

    def __init__(self, vocab_size: int, width: int, length: int, **sizes: Any) -> None:
        super().__init__()
        self.sizes = {"vocab_size": vocab_size, "width": width, "length": length, **sizes}
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(idx)
        x = x + (x * self.places(torch.arange(idx.shape[1], device=idx.device))).cumsum(1).tanh()
        logits = self.head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss


class Positional(Bag):
    def __init__(self, vocab_size: int, d_model: int, nhead: int = 8, n_layers: int = 6, max_len: int = 99) -> None:
        super().__init__(vocab_size, d_model, max_len, heads=nhead, layers=n_layers)


class Wide(Bag):
    def __init__(self, *, vocab_size: int, hidden_dim: int, block_size: int, bias: bool = True, device: str) -> None:
        super().__init__(vocab_size, hidden_dim, block_size, bias=bias, device=device)


class Switched(Bag):
    def __init__(
        self, vocab_size: int, dim: int, seq_len: int, bias: bool, pad_id: int, pad_idx: int | None = None
    ) -> None:
        super().__init__(vocab_size, dim, seq_len, bias=bias, padding=(pad_id, pad_idx))


class Deep(Bag):
    def __init__(
        self, vocab_size: int, dim: int, hidden_dim: int, n_kv_heads: int, head_dim: int, seq_len: int
    ) -> None:
        super().__init__(vocab_size, dim, seq_len, mlp=hidden_dim, kv_heads=n_kv_heads, head=head_dim)


class Tutorial(Bag):
    def __init__(self, ntoken: int, ninp: int, nhead: int, nhid: int, nlayers: int, maxlen: int) -> None:
        super().__init__(ntoken, ninp, maxlen, heads=nhead, mlp=nhid, layers=nlayers)


class FromScratch(Bag):
    def __init__(self, vocab_size: int, embd_size: int, n_attn_heads: int, n_block: int, block_len: int) -> None:
        super().__init__(vocab_size, embd_size, block_len, heads=n_attn_heads, layers=n_block)


@pytest.mark.parametrize(
    ("make", "sizes", "said"),
    [
        (
            Positional,
            {"heads": 2, "layers": 3},
            "Positional(d_model=hidden_size, max_len=max_seq_len, n_layers=num_layers, nhead=num_heads, vocab_size)",
        ),
        (
            Wide,
            {"bias": True, "device": "cpu"},
            "Wide(block_size=max_seq_len, vocab_size, hidden_dim=hidden_size)",
        ),
        (
            Switched,
            {"bias": False, "padding": (0, None)},
            "Switched(dim=hidden_size, seq_len=max_seq_len, vocab_size, bias=False, pad_id=0)",
        ),
        (
            Deep,
            {"mlp": 7, "kv_heads": 1, "head": 6},
            "Deep(dim=hidden_size, head_dim=head_size, n_kv_heads=num_kv_heads, seq_len=max_seq_len, vocab_size, "
            "hidden_dim=intermediate_size)",
        ),
        (
            Tutorial,
            {"heads": 2, "mlp": 7, "layers": 3},
            "Tutorial(maxlen=max_seq_len, nhead=num_heads, nhid=intermediate_size, ninp=hidden_size, "
            "nlayers=num_layers, ntoken=vocab_size)",
        ),
        (
            FromScratch,
            {"heads": 2, "layers": 3},
            "FromScratch(block_len=max_seq_len, embd_size=hidden_size, n_attn_heads=num_heads, n_block=num_layers, "
            "vocab_size)",
        ),
    ],
    ids=["Positional", "Wide", "Switched", "Deep", "Tutorial", "FromScratch"],
)
def test_arguments_are_sizes_by_the_names_that_people_give_them(
    make: type[Bag], sizes: dict[str, Any], said: str
) -> None:
    factory = ByNames(make)
    module: Any = factory(CONFIG)
    assert module.sizes == {"vocab_size": 11, "width": 12, "length": 9, **sizes}
    assert factory.said == said


def test_no_name_stands_for_two_sizes() -> None:
    names = [name for theirs in SIZE_NAMES.values() for name in theirs]
    assert not [name for name, count in Counter(names).items() if count > 1]


FILE = """
from __future__ import annotations
from dataclasses import dataclass
from tests.test_building import Bag

@dataclass
class TrainConfig:
    dropout: float = 0.5
    lr: float = 1e-3

@dataclass
class DataConfig:
    path: str
    vocab_size: int
    dim: int
    depth: int
    seq_len: int

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_embd: int = 768
    bias: bool = True

class Plain:
    vocab_size = 50304
    emb_size = 768
    seq_length = 1024
    bias = True

class Loose:
    vocab_size: int
    d_model: int
    n_ctx: int

    def __init__(self, **settings):
        self.__dict__.update(settings)
        assert self.d_model > 4, "too narrow"

BOOK = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "qkv_bias": True}

class GPT(Bag):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.n_embd, config.block_size, bias=config.bias)

class Hinted(Bag):
    def __init__(self, c: Plain, n_layers=1):
        super().__init__(c.vocab_size, c.emb_size, c.seq_length, bias=c.bias, layers=n_layers)

class ByKeywords(Bag):
    def __init__(self, c: Loose):
        super().__init__(c.vocab_size, c.d_model, c.n_ctx, bias=True)

class Book(Bag):
    def __init__(self, cfg):
        super().__init__(cfg["vocab_size"], cfg["emb_dim"], cfg["context_length"], bias=cfg["qkv_bias"])

class Bare(Bag):
    def __init__(self, cfg):
        super().__init__(cfg["vocab_size"], cfg["emb_dim"], cfg["context_length"], bias=cfg["kv_bias"] or cfg.use_rope)

class Refuses(Bag):
    def __init__(self, vocab_size, d_model, n_heads, max_len):
        assert n_heads == 1, "one head only"
        super().__init__(vocab_size, d_model, max_len)

class Unknown(Bag):
    def __init__(self, vocab_size, d_model, n_experts):
        super().__init__(vocab_size, d_model, 99)

class Misses(Bag):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.n_embd, config.n_quux)
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    path = tmp_path_factory.mktemp("strangers") / "strangers_own.py"
    path.write_text(FILE, encoding="utf-8")
    return lambda name: import_named(f"{path}:{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPT", "GPT(GPTConfig(block_size=max_seq_len, n_embd=hidden_size, vocab_size))"),
        ("Hinted", "Hinted(Plain(emb_size=hidden_size, seq_length=max_seq_len, vocab_size), n_layers=num_layers)"),
        ("ByKeywords", "ByKeywords(Loose(d_model=hidden_size, n_ctx=max_seq_len, vocab_size))"),
        ("Book", "Book(a configuration with context_length=max_seq_len, emb_dim=hidden_size, vocab_size)"),
        ("Bare", "Bare(a configuration with context_length=max_seq_len, emb_dim=hidden_size, vocab_size)"),
    ],
)
def test_a_configuration_is_made_as_the_file_beside_says(strangers: Callable[[str], Any], name: str, said: str) -> None:
    factory = ByNames(strangers(name))
    module: Any = factory(CONFIG)
    expected = {"vocab_size": 11, "width": 12, "length": 9, "bias": name != "Bare"}
    assert module.sizes == expected | ({"layers": 3} if name == "Hinted" else {})
    assert factory.said == said


def test_it_is_verified_without_a_function_of_its_own(strangers: Callable[[str], Any]) -> None:
    report = check_causal_lm(strangers("GPT"), profile="quick", only=[SHAPES, "loss.value", "state.strict_load"])
    assert {result.status for result in report.results} == {"passed"}
    assert report.called.startswith("GPT(GPTConfig(block_size=max_seq_len, n_embd=hidden_size, vocab_size)); forward(")


def test_what_its_assertions_rule_out_is_refused(strangers: Callable[[str], Any]) -> None:
    report = check_causal_lm(strangers("Refuses"), profile="quick", only=["shape.logits"])
    assert [result.status for result in report.results] == ["passed"]
    assert report.refused
    with pytest.raises(NotImplementedError, match="AssertionError: one head only"):
        ByNames(strangers("Refuses"))(CONFIG)
    narrow = DIYConfig.from_dict(CONFIG.to_dict() | {"hidden_size": 4})
    with pytest.raises(NotImplementedError, match="AssertionError: too narrow"):
        ByNames(strangers("ByKeywords"))(narrow)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Unknown", "its argument n_experts is not the name of a size that is known here: give it a default"),
        ("Misses", "by the names of its arguments: AttributeError: 'GPTConfig' object has no attribute 'n_quux'"),
    ],
)
def test_an_unknown_name_is_said(strangers: Callable[[str], Any], name: str, said: str) -> None:
    with pytest.raises(SubjectError, match="config has vocab_size, num_layers, ") as error:
        Subject(strangers(name)).convention  # noqa: B018
    assert said in str(error.value)


class Lecture(Bag):
    """As in a lecture, where the sizes stand at the top of the file."""

    def __init__(self) -> None:
        super().__init__(27, 16, 12)

    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        for _ in range(max_new_tokens):
            probabilities = self(idx[:, -12:])[0][:, -1].softmax(-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), 1)
        return idx


def test_a_module_keeps_its_own_sizes_and_is_asked_for_no_others() -> None:
    report = check_causal_lm(Lecture, profile="quick", skip=["numerics.*", "training.*"])
    assert not report.failed, [result.failure for result in report.failed]
    assert report.called.startswith("Lecture(); forward(idx, targets)")
    assert report.called.endswith("whatever the configuration says, vocab_size=27, max_seq_len=12")
    passed = {result.check.id for result in report.results if result.status == "passed"}
    assert passed >= {"loss.value", "loss.many_labels", "causality.long_row", "generation.follows_distribution"}


def test_a_module_that_is_never_tiny_is_told_of_what_takes_the_time() -> None:
    class Large(Bag):
        def __init__(self) -> None:
            super().__init__(5000, 128, 64)

    assert re.search(r"the smallest has 1,\d\d\d,\d\d\d parameters, so every trial", Subject(Large).describe())
    assert "parameters" not in Subject(Lecture).describe()


@pytest.mark.parametrize("id", ["numerics.bfloat16_near_float64", "gradients.absent_tokens_zero"])
def test_checks_of_a_size_of_their_own_take_the_modules(id: str) -> None:
    (result,) = check_causal_lm(Lecture, profile="quick", only=[id]).results
    assert result.status == "passed", result


def test_an_error_beyond_its_own_length_is_found_within_it() -> None:
    class Leaks(Lecture):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            return super().forward(idx.flip(1), targets)

    (result,) = check_causal_lm(Leaks, profile="quick", only=["causality.edit"]).results
    assert result.failure is not None
    assert result.failure.config["vocab_size"] == 27
    assert result.failure.config["max_seq_len"] == 12


def follows(config: DIYConfig) -> nn.Module:
    return Bag(config.vocab_size, config.hidden_size, config.max_seq_len)


def rounds_up(config: DIYConfig) -> nn.Module:
    """A vocabulary of whole blocks, as litgpt's: the rest of it is nobody's token."""
    return Bag(-(-config.vocab_size // 512) * 512, config.hidden_size, config.max_seq_len)


def test_a_module_that_follows_its_configuration_has_no_sizes_of_its_own() -> None:
    for factory in (follows, rounds_up):
        subject = Subject(factory)
        assert subject.describe() == subject.convention.describe()
        assert subject.own_sizes == {}
