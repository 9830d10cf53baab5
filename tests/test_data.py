"""Text -> tokens -> batches: nothing is lost, nothing is scored twice, nothing depends on hidden state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diymodel import data
from diymodel.config import TrainConfig
from diymodel.data import (
    IGNORE,
    Rows,
    default_documents,
    fingerprint,
    read_documents,
    split_documents,
)
from diymodel.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
TEXTS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=6)
LENGTHS = st.integers(2, 12)
BATCHINGS = st.sampled_from(["packed", "padded"])


def stream_of(documents: list[str]) -> list[int]:
    """All tokens in reading order, with an end-of-document token before the first document and after each."""
    tokens = [TOKENIZER.eos_id]
    for text in documents:
        tokens += [*text.encode(), TOKENIZER.eos_id]
    return tokens


# ---------------------------------------------------------------------------------------------------------- documents


def test_default_documents_never_repeat_a_paragraph() -> None:
    documents = default_documents()
    paragraphs = [" ".join(p.split()) for text in documents for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    assert len(documents) > 40
    assert sum(map(len, documents)) > 300_000
    assert documents == default_documents()


def test_files_and_folders_are_read_sorted_and_whole(tmp_path: Path) -> None:
    for name, content in {"b.txt": "B", "a/z.md": "Z", "a/y.py": "Y\n", "c.rst": "ünï"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros.bin").write_bytes(b"\0" * 8)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    assert read_documents([tmp_path]) == ["Y\n", "Z", "B", "ünï"]
    assert read_documents([tmp_path / "c.rst", tmp_path / "a"]) == ["ünï", "Y\n", "Z"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_documents([tmp_path]) == ["hello"]


def test_a_named_file_that_is_not_utf8_is_refused_with_path_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("abc é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text: .* at byte offset 4$"):
        read_documents([path])


def test_nothing_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no text found in {tmp_path}"):
        read_documents([tmp_path])
    with pytest.raises(FileNotFoundError, match="missing"):
        read_documents([tmp_path / "missing"])


@given(st.lists(st.text(max_size=20), max_size=30))
def test_the_split_loses_nothing_and_holds_out_about_a_tenth(documents: list[str]) -> None:
    if max(map(len, documents), default=0) < 2:
        with pytest.raises(ValueError, match="too little text"):
            split_documents(documents)
        return
    training, held_out = split_documents(documents)
    total = sum(map(len, documents))
    assert sorted("".join(training) + "".join(held_out)) == sorted("".join(documents))
    assert (training, held_out) == split_documents(documents)
    if set(held_out) <= set(documents) and sorted(training + held_out) == sorted(documents):
        assert total / 20 <= sum(map(len, held_out)) <= total / 10
    else:  # the end of the longest document
        longest = next(text for text in documents if len(text) == max(map(len, documents)))
        assert longest.endswith(held_out[0])
        assert len(held_out[0]) == max(1, len(longest) // 10)


def test_the_split_keeps_a_document_on_its_side_when_others_move() -> None:
    """Which documents are held out follows from their text, not from their place in the list."""
    documents = [f"document {i} " * 5 for i in range(40)]
    held_out = split_documents(documents)[1]
    assert 2 <= len(held_out) <= 4
    assert sorted(split_documents(documents[::-1])[1]) == sorted(held_out)


def test_one_document_is_split_at_nine_tenths() -> None:
    assert split_documents(["0123456789" * 10]) == (["0123456789" * 9], ["0123456789"])


def test_fingerprint_sees_text_borders_and_order() -> None:
    variants = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "d"]]
    assert len({fingerprint(documents) for documents in variants}) == len(variants)
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])


# ------------------------------------------------------------------------------------------------------ rows, batches


@given(TEXTS, LENGTHS, BATCHINGS, st.integers(1, 5))
def test_every_token_but_the_first_is_predicted_exactly_once(
    documents: list[str], max_seq_len: int, batching: str, batch_size: int
) -> None:
    rows = Rows(documents, TOKENIZER, max_seq_len, batching)
    tokens = stream_of(documents)
    predicted = []
    for first in range(0, len(rows), batch_size):
        batch = rows.batch(range(len(rows))[first : first + batch_size])
        assert batch.input_ids.shape[1] <= max_seq_len
        for labels in batch.labels:
            predicted += [int(label) for label in labels[1:] if label != IGNORE]
    assert predicted == tokens[1:]
    assert rows.num_scored == len(predicted)
    assert rows.num_bytes == sum(token != TOKENIZER.eos_id for token in predicted)


@given(TEXTS, LENGTHS, BATCHINGS)
def test_labels_are_the_inputs_except_exactly_at_the_padding(
    documents: list[str], max_seq_len: int, batching: str
) -> None:
    rows = Rows(documents, TOKENIZER, max_seq_len, batching)
    batch = rows.batch(range(len(rows)))
    T = batch.input_ids.shape[1]
    lengths = batch.seq_lengths if batch.seq_lengths is not None else torch.full((len(rows),), T)
    padding = torch.arange(T) >= lengths[:, None]
    assert torch.equal(batch.labels == IGNORE, padding)
    assert torch.equal(batch.input_ids == TOKENIZER.pad_id, padding)
    assert torch.equal(batch.labels[~padding], batch.input_ids[~padding])
    assert int(lengths.min()) >= 2
    assert (batch.seq_lengths is None) == (not padding.any())


@given(TEXTS, LENGTHS)
def test_padded_rows_hold_one_document_and_teach_its_end(documents: list[str], max_seq_len: int) -> None:
    rows = Rows(documents, TOKENIZER, max_seq_len, "padded")
    batch = rows.batch(range(len(rows)))
    # An end-of-document token can only stand first in a row, or be its last real token, whose label is kept.
    ends = 0
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        real = [token for token in ids if token != TOKENIZER.pad_id]
        assert TOKENIZER.eos_id not in real[1:-1]
        ends += labels[len(real) - 1] == TOKENIZER.eos_id
    assert ends == len(documents)


def test_a_real_token_that_looks_like_padding_is_scored() -> None:
    """Bug class pad-equals-eos-masked: the mask comes from lengths, never from comparing with the pad id."""

    class PadIsEnd(ByteTokenizer):
        pad_id = ByteTokenizer.eos_id

    batch = Rows(["ab", "abcd"], PadIsEnd(), 8, "padded").batch([0, 1])
    assert batch.labels.tolist() == [[256, 97, 98, 256, IGNORE, IGNORE], [256, 97, 98, 99, 100, 256]]


def test_only_the_last_packed_row_can_be_short() -> None:
    rows = Rows(["abcdefg", "hij"], TOKENIZER, 4, "packed")  # E abcdefg E hij E: 13 tokens
    ids = [rows.batch([i]).input_ids[0].tolist() for i in range(len(rows))]
    assert [len(row) for row in ids] == [4, 4, 4, 4]
    assert [before[-1] for before in ids[:-1]] == [after[0] for after in ids[1:]]
    assert [len(Rows(["abcdefg"], TOKENIZER, 4).batch([i]).input_ids[0]) for i in range(3)] == [4, 4, 3]


@given(st.integers(1, 9), st.integers(0, 2**64 - 1), TEXTS)
def test_each_epoch_takes_every_row_once_in_an_order_of_its_own(
    batch_size: int, seed: int, documents: list[str]
) -> None:
    rows = Rows(documents, TOKENIZER, 4)
    n = len(rows)
    config = TrainConfig(batch_size=batch_size, seed=seed)
    number_of = {tuple(rows.batch([i]).input_ids[0].tolist()): i for i in range(n)}
    if len(number_of) < n:
        return  # two rows with the same tokens cannot be told apart
    taken: list[int] = []
    for number in range(-(-3 * n // batch_size)):
        batch = rows.micro_batch(number, config)
        assert batch.input_ids.shape[0] == batch_size
        for ids in batch.input_ids.tolist():
            taken.append(number_of[tuple(token for token in ids if token != TOKENIZER.pad_id)])
    epochs = [taken[first : first + n] for first in range(0, 3 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    rows = Rows(["abcdefghijklmnopqrstuvwxyz" * 4], TOKENIZER, 4)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return rows.micro_batch(epoch, TrainConfig(batch_size=len(rows), seed=seed)).input_ids.tolist()

    reference = order(0, 0)
    torch.manual_seed(123)
    data._order.cache_clear()
    assert order(0, 0) == reference
    assert order(1, 0) != reference
    assert order(0, 1) != reference
    assert data._order(5, 0, 0) == [2, 4, 3, 1, 0]  # the same on every machine


def test_evaluation_takes_every_row_once_or_an_even_sample() -> None:
    rows = Rows(["abcdefghijklmnopqrstuvwxyz"], TOKENIZER, 3)
    assert sum(batch.input_ids.shape[0] for batch in rows.in_order(4, 100)) == len(rows)
    sizes = [batch.input_ids.shape[0] for batch in rows.in_order(4, 2)]
    assert sizes == [4, 4]


def test_rows_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match="no documents"):
        Rows([], TOKENIZER, 8)
    with pytest.raises(ValueError, match="max_seq_len=1"):
        Rows(["abc"], TOKENIZER, 1)
    with pytest.raises(ValueError, match="batching='pakced' must be 'packed' or 'padded'"):
        Rows(["abc"], TOKENIZER, 8, "pakced")
