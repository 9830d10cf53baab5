"""From text to batches: reading documents, the held-out share, rows of tokens and their order.

A document is a string. Every document is followed by one end-of-document token, and the first is preceded by one too:
what the model learns to do after that token is to begin a document.

Shapes: B rows in a micro-batch, T tokens in its longest row.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diymodel.config import TrainConfig
from diymodel.tokenizer import JsonTokenizer, Tokenizer

HELD_OUT_SHARE = 0.1  # of the text, for evaluation only
IGNORE = -100  # the label of padding


# ---------------------------------------------------------------------------------------------------------- documents


def default_documents() -> list[str]:
    """The Python language reference that every CPython carries for ``help("topics")``, one document a topic.

    Topics repeat each other: "function" stands once more inside "compound". Text both trained on and held out would
    flatter the evaluation, so a paragraph is kept once, in the longest topic that has it, and a topic with less than
    half of its text left makes no document.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        document = "\n\n".join(paragraphs)
        if len(document) >= len(text) / 2:
            kept[name] = document
    return [kept[name] for name in sorted(kept)]


def read_documents(paths: Sequence[str | Path]) -> list[str]:
    """Read text files, one document each, and folders: all their files, subfolders too, sorted by path.

    In a folder, hidden files and folders and files that are not UTF-8 text are passed over; a file named directly must
    be text. Empty files make no document.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is not UTF-8 (path and byte offset are given), or nothing holds any text.
    """
    documents = []
    for path in map(Path, paths):
        if path.is_dir():
            documents += [text for file in _files_in(path) if (text := _text_or_none(file)) is not None]
        else:
            documents.append(_read_text(path, "a text file, or a folder of them"))
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"no text found in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return documents


def _files_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read_text(path: Path, expected: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}: expected {expected}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte offset {error.start}") from None


def _text_or_none(path: Path) -> str | None:
    """The text of a file met in a folder; None where it is none. A NUL is valid UTF-8, but no text has one."""
    try:
        text = _read_text(path, "text")
    except ValueError:
        return None
    return None if "\0" in text else text


def read_tokenizer(path: str | Path) -> JsonTokenizer:
    """The tokenizer in a ``tokenizer.json`` file.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :func:`read_documents` and :class:`JsonTokenizer`.
    """
    return JsonTokenizer(_read_text(Path(path), "a Hugging Face tokenizer.json"))


def split_documents(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) documents, a tenth of the text held out; it depends on nothing but the text.

    Documents are taken in the order of their hashes, as good as drawn by lot, as long as they fit into a tenth. Where
    this finds not even half of it (few documents, or a single one), the end of the longest is held out instead.

    Raises:
        ValueError: there is too little text to hold out any.
    """
    most = HELD_OUT_SHARE * sum(map(len, documents))
    chosen: set[int] = set()
    held = 0
    for i in sorted(range(len(documents)), key=lambda i: fingerprint([documents[i]])):
        if held + len(documents[i]) <= most:
            chosen.add(i)
            held += len(documents[i])
    if held and held >= most / 2:
        training = [text for i, text in enumerate(documents) if i not in chosen]
        return training, [documents[i] for i in sorted(chosen)]
    longest = max(range(len(documents)), key=lambda i: len(documents[i]), default=None)
    if longest is None or len(documents[longest]) < 2:
        raise ValueError("there is too little text to train on some of it and to evaluate on the rest")
    text = documents[longest]
    cut = len(text) - max(1, int(HELD_OUT_SHARE * len(text)))
    return [*documents[:longest], text[:cut], *documents[longest + 1 :]], [text[cut:]]


def fingerprint(documents: Sequence[str]) -> str:
    """A short hash of the documents' text, their borders and their order."""
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ rows, batches


class Batch(NamedTuple):
    """What one forward and backward pass needs."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, unshifted: input_ids with IGNORE at the padding
    seq_lengths: Tensor | None  # (B,) int64, real tokens of each row; None: no padding

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        lengths = self.seq_lengths
        return Batch(self.input_ids.to(device), self.labels.to(device), None if lengths is None else lengths.to(device))


class Rows:
    """Documents as rows of at most ``max_seq_len`` tokens, and the order in which training takes them.

    A row's first token is the last one of the row before it, so that every token but the very first is predicted once.
    "packed" cuts one long stream of all documents, so that only its last row can be short (a row may then look back
    into the document before). "padded" starts a new row at each document, and short rows are padded on the right.

    Args:
        documents: the texts.
        tokenizer: encodes them.
        max_seq_len: most tokens in a row; at least 2, one to read and one to predict.
        batching: "packed" or "padded".

    Attributes:
        num_scored: how many tokens all rows together predict, end-of-document tokens included.
        num_bytes: how many bytes of text these tokens stand for; an end-of-document token stands for none.

    Raises:
        ValueError: there is no document, max_seq_len is below 2, or batching is neither of the two.
    """

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, max_seq_len: int, batching: str = "packed"
    ) -> None:
        if not documents:
            raise ValueError("there are no documents to make rows of")
        if max_seq_len < 2:
            raise ValueError(
                f"max_seq_len={max_seq_len}: a row needs a token to read and one to predict, so at least 2"
            )
        if batching not in ("packed", "padded"):
            raise ValueError(f"batching={batching!r} must be 'packed' or 'padded'")
        tokens = [tokenizer.eos_id]
        borders = [0]  # where the end-of-document tokens stand
        for text in documents:
            tokens += tokenizer.encode(text)
            borders.append(len(tokens))
            tokens.append(tokenizer.eos_id)
        if batching == "packed":
            borders = [borders[0], borders[-1]]
        self._tokens = torch.tensor(tokens, dtype=torch.int32)  # half the memory of what a batch needs
        self._pad_id = tokenizer.pad_id
        self._max_seq_len = max_seq_len
        self._rows = [
            (start, min(start + max_seq_len, last + 1))
            for first, last in itertools.pairwise(borders)
            for start in range(first, last, max_seq_len - 1)
        ]
        self.num_scored = len(tokens) - 1
        self.num_bytes = sum(len(text.encode()) for text in documents)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of these numbers, each in [0, len)."""
        pieces = [self._tokens[slice(*self._rows[row])] for row in rows]
        lengths = torch.tensor([len(piece) for piece in pieces])
        T = int(lengths.max())
        padding = torch.arange(T) >= lengths[:, None]
        input_ids = torch.full((len(rows), T), self._pad_id)
        for row, piece in enumerate(pieces):
            input_ids[row, : len(piece)] = piece
        # The padding is where the lengths say it is: looking for pad_id could hide a real token.
        return Batch(input_ids, input_ids.masked_fill(padding, IGNORE), lengths if bool(padding.any()) else None)

    def micro_batch(self, number: int, config: TrainConfig) -> Batch:
        """The training batch of this number, counted from 0 over the whole run.

        Every epoch takes all rows once, in an order that follows from (seed, epoch) alone, and the next epoch goes on
        where it ends, in the middle of a batch if need be. So the number says everything about the place in the data,
        and a resumed run has no shuffling state to lose.
        """
        first = number * config.batch_size
        places = (divmod(place, len(self)) for place in range(first, first + config.batch_size))
        return self.batch([_order(len(self), config.seed, epoch)[row] for epoch, row in places])

    def in_order(self, batch_size: int, most: int) -> Iterator[Batch]:
        """For evaluation: every row once, in batches, the last one smaller; but at most ``most`` batches of rows that
        are drawn from everywhere, always the same ones.
        """
        rows = _order(len(self), 0, 0)[: batch_size * most]
        for first in range(0, len(rows), batch_size):
            yield self.batch(rows[first : first + batch_size])


@functools.lru_cache(maxsize=8)  # a batch needs two epochs' at most, training and held-out text each
def _order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the rows. A string seeds ``random.Random`` by its hash, the same on every machine."""
    order = list(range(num_rows))
    random.Random(json.dumps([seed, epoch])).shuffle(order)
    return order
