"""From text to batches: reading documents, tokenizers, the held-out share, rows of tokens and their order.

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
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diymodel.config import TrainConfig

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
            documents.append(_read_text(path))
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"no text found in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return documents


def _files_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte offset {error.start}") from None


def _text_or_none(path: Path) -> str | None:
    """The text of a file met in a folder; None where it is none. A NUL is valid UTF-8, but no text has one."""
    try:
        text = _read_text(path)
    except ValueError:
        return None
    return None if "\0" in text else text


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


# --------------------------------------------------------------------------------------------------------- tokenizers


class Tokenizer(ABC):
    """Text to token ids and back. ``eos_id`` ends a document and ``pad_id`` fills short rows; they differ, so that
    hiding the padding never hides the token that teaches the model to stop.
    """

    vocab_size: int
    eos_id: int
    pad_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any end-of-document token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; ``eos_id`` and ``pad_id`` have none, and bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_dict(self) -> dict[str, str]:
        """What :func:`tokenizer_from_dict` rebuilds it from, as plain strings: it is stored in the checkpoint."""

    def check_fits(self, vocab_size: int) -> None:
        """Raise ``ValueError`` where a model of this vocabulary cannot take every token."""
        if vocab_size < self.vocab_size:
            raise ValueError(f"vocab_size={vocab_size} is too small: the tokenizer has {self.vocab_size} tokens")

    def stream(self) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        return TextStream(self)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0 … 255, ``eos_id`` 256, ``pad_id`` 257. Any text survives ``decode(encode(text))``."""

    vocab_size = 258
    eos_id = 256
    pad_id = 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, str]:
        return {"kind": "bytes"}


class JsonTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``.

    The end-of-document and the padding token are looked up under the names in use; one that is missing gets an id of
    its own after the file's last.

    Args:
        text: the content of the file.
        eos_token: the end-of-document token's name, where it is known. None: look it up.
        add_special_tokens: encode with whatever the file puts around a text, such as a begin-of-text token. Right for a
            prompt to the model that the file came with; a model trained here has never seen it.

    Raises:
        ImportError: the ``tokenizers`` library is not installed; the message says how to install it.
        ValueError: the text is no tokenizer.json, or has no token ``eos_token``.
    """

    EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]", "[SEP]")
    PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")

    def __init__(self, text: str, eos_token: str | None = None, add_special_tokens: bool = False) -> None:
        try:
            import tokenizers
        except ImportError:
            raise ImportError("a tokenizer.json needs the tokenizers library: pip install 'diymodel[hf]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()  # a file may carry the settings of somebody's training batches
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if eos_token is not None and eos_token not in vocabulary:
            raise ValueError(f"the tokenizer.json has no token {eos_token!r}")
        after_last = 1 + max(vocabulary.values(), default=-1)
        eos_names = self.EOS_NAMES if eos_token is None else (eos_token,)
        self.eos_id = next((vocabulary[name] for name in eos_names if name in vocabulary), after_last)
        after_last = max(after_last, 1 + self.eos_id)
        self.pad_id = next((vocabulary[name] for name in self.PAD_NAMES if name in vocabulary), after_last)
        self.vocab_size = max(after_last, 1 + self.pad_id)
        self._add_special_tokens = add_special_tokens
        self._dict = {"kind": "tokenizer.json", "json": text} | ({"eos_token": eos_token} if eos_token else {})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=self._add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i not in (self.eos_id, self.pad_id)]
        text: str = self._tokenizer.decode(known, skip_special_tokens=True)
        return text

    def to_dict(self) -> dict[str, str]:
        return self._dict


def read_tokenizer(path: str | Path) -> JsonTokenizer:
    """The tokenizer in a ``tokenizer.json`` file.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :func:`read_documents` and :class:`JsonTokenizer`.
    """
    return JsonTokenizer(_read_text(Path(path)))


def tokenizer_from_dict(values: Mapping[str, str]) -> Tokenizer:
    """The inverse of :meth:`Tokenizer.to_dict`.

    Raises:
        ValueError: the kind is unknown.
    """
    match values.get("kind"):
        case "bytes":
            return ByteTokenizer()
        case "tokenizer.json":
            return JsonTokenizer(values["json"], values.get("eos_token"))
        case kind:
            raise ValueError(f"tokenizer kind {kind!r} is unknown; there are 'bytes' and 'tokenizer.json'")


class TextStream:
    """Decodes tokens as they come; all pieces together are ``tokenizer.decode`` of all tokens.

    A character may span tokens, so text is held back while its end is not a whole character. Text is decoded together
    with the piece before it, since some tokenizers write a word's first space only after another word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._before: list[int] = []
        self._held: list[int] = []

    def feed(self, token: int) -> str:
        """The text that became certain with this token; often, but not always, some."""
        self._held.append(token)
        text = self._text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._before, self._held = self._held, []
        return text

    def flush(self) -> str:
        """The rest, whole characters or not."""
        text = self._text()
        self._before, self._held = [], []
        return text

    def _text(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]


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
        ValueError: there is no document, or max_seq_len is below 2.
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
