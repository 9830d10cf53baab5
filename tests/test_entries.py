"""Generation that is no method named ``generate``: found beside the class, or beside the factory, as books write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diymodel.verify.registry import list_checks
from diymodel.verify.runner import verify_one
from diymodel.verify.settings import Settings
from diymodel.verify.subject import Subject, resolve

CHECKS = {check.id: check for check in list_checks() if check.id.startswith("generation.")}

MODEL = '''
import torch
from torch import nn

class LM(nn.Module):
    """The next token depends on the last one and on how many there are."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.positions = nn.Embedding(config.max_seq_len, 8)
        self.head = nn.Linear(8, config.vocab_size)

    def forward(self, in_idx):
        return self.head(self.embed(in_idx) + self.positions(torch.arange(in_idx.shape[1])))
'''
SIMPLE = """
def generate_text_simple(model, idx, max_new_tokens, context_size):
    for _ in range(max_new_tokens):
        idx = torch.cat((idx, model(idx[:, -context_size:])[:, -1:].argmax(-1)), 1)
    return idx
"""
DRAWS = """
@torch.no_grad()
def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, device="cuda"):
    idx = idx.to(device)
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        if top_k is not None:
            logits[logits < logits.topk(min(top_k, logits.shape[-1]))[0][:, -1:]] = -torch.inf
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            new = logits.argmax(-1, keepdim=True)
        idx = torch.cat((idx, new), 1)
    return idx
"""
OTHERS = """
def generate_text(model, prompt: str, max_new_tokens: int):
    raise AssertionError("it takes text")

def generate_and_print(model, tokenizer, idx, max_new_tokens):
    raise AssertionError("who knows what a tokenizer is")

def generate_stream(model, idx, max_new_tokens):
    yield idx

def generate_data(idx, max_new_tokens):
    raise AssertionError("it takes no model")

def evaluate(model, idx, max_new_tokens):
    raise AssertionError("it does something else")
"""
METHOD = """
    def sample(self, idx, steps):
        return generate_text_simple(self, idx, steps, self.positions.num_embeddings)
"""


def subject(folder: Path, source: str, name: str = "LM") -> Subject:
    """Of a new file each time, since what stands beside the class is what is looked at."""
    (folder / "written.py").write_text(source)
    return resolve(f"{folder / 'written.py'}:{name}")


def entry(subject: Subject) -> str:
    generating = subject.convention.generating
    assert generating is not None
    return str(generating.entry)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (MODEL + SIMPLE, "generate_text_simple(model, …)"),
        (MODEL + SIMPLE + DRAWS, "generate(model, …)"),
        (MODEL + OTHERS + SIMPLE, "generate_text_simple(model, …)"),
        (MODEL + METHOD + SIMPLE, "sample"),
    ],
)
def test_the_most_telling_name_is_taken(source: str, expected: str, tmp_path: Path) -> None:
    found = subject(tmp_path, source)
    assert entry(found) == expected
    assert found.missing("generate") is None
    assert f"it generates by {expected}" in found.convention.describe()


def test_a_method_named_generate_goes_first_and_needs_no_word(tmp_path: Path) -> None:
    found = subject(tmp_path, MODEL + METHOD.replace("sample", "generate") + SIMPLE + DRAWS)
    assert entry(found) == "generate"
    assert "generates by" not in found.convention.describe()


def test_what_the_factorys_file_imports_is_found(tmp_path: Path) -> None:
    (tmp_path / "book_model.py").write_text(MODEL)
    (tmp_path / "book_generate.py").write_text("import torch\n" + SIMPLE)
    imports = "from book_model import LM\nfrom book_generate import generate_text_simple\n"
    found = subject(tmp_path, f"{imports}\ndef small(config):\n    return LM(config)\n", "small")
    assert entry(found) == "generate_text_simple(model, …)"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (MODEL, "generate is not a method of the module"),
        (
            MODEL + OTHERS,
            "generate is not a method of the module, and generate_and_print(model, …) needs tokenizer, which the "
            "harness does not know",
        ),
        (
            MODEL + "def generate(model, idx, how_many_more=1):\n    raise AssertionError('not understood')\n",
            "generate is not a method of the module, and generate(model, …) has no parameter for the number of new "
            "tokens",
        ),
        (
            MODEL + "def generate(model, idx, max_new_tokens):\n    return model.missing(idx)\n",
            "generate is not a method of the module, and generate(model, …) failed on token ids: "
            "AttributeError: 'LM' object has no attribute 'missing'",
        ),
    ],
)
def test_what_does_not_answer_is_no_failure(source: str, reason: str, tmp_path: Path) -> None:
    assert subject(tmp_path, source).missing("generate") == reason


def status(subject: Subject, check: str) -> str:
    return verify_one(subject, CHECKS[check], Settings(5)).status


def test_a_function_is_judged_as_a_method_is(tmp_path: Path) -> None:
    healthy = subject(tmp_path, MODEL + DRAWS)
    ran = {id: status(healthy, id) for id in CHECKS}
    assert set(ran.values()) == {"passed", "skipped"}
    assert {id for id, verdict in ran.items() if verdict == "passed"} >= {
        "generation.greedy_is_argmax",
        "generation.keeps_prompt",
        "generation.rows_draw_independently",
        "generation.temperature_zero",
        "generation.top_k",
    }


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("for _ in range(max_new_tokens)", "for _ in range(max_new_tokens - 1)", "generation.keeps_prompt"),
        ("logits.argmax(", "logits.argmin(", "generation.greedy_is_argmax"),
        ("    idx = idx.to(device)\n", "    model.train(False)\n", "generation.restores_mode"),
    ],
)
def test_its_bugs_are_found(old: str, new: str, check: str, tmp_path: Path) -> None:
    assert DRAWS.count(old) == 1
    assert status(subject(tmp_path, MODEL + DRAWS.replace(old, new)), check) == "failed"


def test_settings_reach_the_function_for_each_configuration(tmp_path: Path) -> None:
    """A context of another configuration would cut the prompt, or not at all."""
    source = MODEL + SIMPLE.replace(
        "    for _", "    assert context_size == model.positions.num_embeddings\n    for _", 1
    )
    assert status(subject(tmp_path, source), "generation.keeps_prompt") == "passed"


def test_a_replay_calls_the_same_function(tmp_path: Path) -> None:
    from diymodel.verify.runner import replay

    broken: Any = subject(tmp_path, MODEL + DRAWS.replace("logits.argmax(", "logits.argmin("))
    failure = verify_one(broken, CHECKS["generation.greedy_is_argmax"], Settings(5)).failure
    assert failure is not None
    assert replay(broken.name, CHECKS["generation.greedy_is_argmax"], failure.values).status == "failed"
