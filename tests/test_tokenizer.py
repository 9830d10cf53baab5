"""Tokenizers: what they encode comes back, piece by piece too, and they survive being stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diymodel.data import read_tokenizer
from diymodel.tokenizer import ByteTokenizer, JsonTokenizer, tokenizer_from_dict

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_bytes_decode_to_the_text_they_encode(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text.encode())
    assert TOKENIZER.decode([TOKENIZER.eos_id, *ids, TOKENIZER.eos_id, TOKENIZER.pad_id]) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_streaming_any_bytes_equals_decoding_them(ids: list[int]) -> None:
    stream = TOKENIZER.stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == TOKENIZER.decode(ids)


def test_streaming_shows_a_character_with_its_last_byte() -> None:
    stream = TOKENIZER.stream()
    assert [stream.feed(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.feed(0xE2) == ""
    assert stream.flush() == "\ufffd"


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer trained on a few lines, as a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat and the € sign"] * 20, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.enable_truncation(4)
    text: str = tokenizer.to_str()
    return text


@given(text=st.text(max_size=40))
def test_a_tokenizer_json_survives_storing_and_streams_what_it_decodes(tokenizer_json: str, text: str) -> None:
    tokenizer = tokenizer_from_dict(JsonTokenizer(tokenizer_json).to_dict())
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_a_tokenizer_json_names_its_end_token_or_gets_one(tokenizer_json: str) -> None:
    tokenizer = JsonTokenizer(tokenizer_json)
    size = tokenizer.vocab_size - 1
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, size)  # "</s>", and a new one for the padding it lacks
    assert len(tokenizer.encode("the " * 20)) > 4  # somebody's truncation is off
    assert JsonTokenizer(tokenizer_json, add_special_tokens=True).encode("the") == [0, *tokenizer.encode("the")]
    assert JsonTokenizer(tokenizer_json, eos_token="<s>").eos_id == 0
    with pytest.raises(ValueError, match="no token '<none>'"):
        JsonTokenizer(tokenizer_json, eos_token="<none>")
    nameless = JsonTokenizer(tokenizer_json.replace("</s>", "<other>"))
    assert (nameless.eos_id, nameless.pad_id, nameless.vocab_size) == (size, size + 1, size + 2)


def test_a_tokenizer_file_is_read_and_a_wrong_one_refused(tokenizer_json: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json, encoding="utf-8")
    assert read_tokenizer(path).to_dict() == {"kind": "tokenizer.json", "json": tokenizer_json}
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        read_tokenizer(path)
    with pytest.raises(ValueError, match="kind 'words' is unknown"):
        tokenizer_from_dict({"kind": "words"})


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'diymodel\[hf\]'"):
        JsonTokenizer("{}")


def test_a_tokenizer_description_is_plain_json(tokenizer_json: str) -> None:
    for tokenizer in (TOKENIZER, JsonTokenizer(tokenizer_json, eos_token="<s>")):
        values = json.loads(json.dumps(tokenizer.to_dict()))
        again = tokenizer_from_dict(values)
        assert (again.eos_id, again.pad_id) == (tokenizer.eos_id, tokenizer.pad_id)
