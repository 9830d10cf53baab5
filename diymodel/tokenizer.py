"""Text to token ids and back: bytes, or a Hugging Face ``tokenizer.json``; whole, or token by token as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence


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
