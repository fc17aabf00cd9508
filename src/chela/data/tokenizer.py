"""From text to tokens and back: its bytes, or a byte-level BPE trained on it.

Both take any bytes, UTF-8 or not, and give the same bytes back, so that bits per byte mean the same with either.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

END = "<|endoftext|>"
"""The token behind every document (BPE alone)."""
FILE = "tokenizer.json"
PIECE, TOGETHER = 1 << 16, 64
"""Bytes of text that are encoded at a time, and how many such pieces side by side."""
ODD = re.compile("([\udc80-\udcff]+)")
BETWEEN_WORDS = re.compile(rb"(?<=[!-~]) (?=[!-~])")


class Coder(ABC):
    """Turns text into tokens and back."""

    vocab: int
    """Number of symbols."""
    end: int | None = None
    """Token behind every document, if there is one."""
    pieces: list[bytes]
    """What each token stands for, [vocab]; a special one stands for nothing."""

    @abstractmethod
    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a text [n]."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens as text; what is no UTF-8 becomes the replacement character."""
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


class ByteCoder(Coder):
    """A token is a byte."""

    def __init__(self) -> None:
        self.vocab, self.pieces = 256, [bytes([value]) for value in range(256)]

    def encode(self, text: bytes) -> np.ndarray:
        """Bytes, uint8 [n]."""
        return np.frombuffer(text, dtype=np.uint8)


class Tokenizer(Coder):
    """A byte-level BPE (Radford et al. 2019), as the library `tokenizers` writes it.

    Args:
        text: content of a tokenizer.json.

    Raises:
        ValueError: `tokenizers` is not installed, or the content is no byte-level BPE.
    """

    def __init__(self, text: str) -> None:
        library = _library()
        try:
            self._library = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{FILE} is damaged, or no file of the library tokenizers ({error})") from None
        self._library.encode_special_tokens = True  # a text that has END in it keeps its characters
        self.vocab, self.end = self._library.get_vocab_size(), self._library.token_to_id(END)
        names = {token: name for name, token in self._library.get_vocab().items()}
        added = self._library.get_added_tokens_decoder()
        try:
            self.pieces = [
                _added(added[token]) if token in added else bytes(ALPHABET[character] for character in names[token])
                for token in range(self.vocab)
            ]
        except KeyError:
            raise ValueError(f"{FILE} is no byte-level BPE: a token has a character that stands for no byte") from None
        self._single = np.zeros(256, dtype=np.int64)
        for token, piece in enumerate(self.pieces):
            if len(piece) == 1:
                self._single[piece[0]] = token

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens, int64 [n]; a byte that is no UTF-8 is a token of its own."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._encoded(text)])

    def _encoded(self, text: bytes) -> Iterator[np.ndarray]:
        parts = _parts(text)
        while batch := list(islice(parts, TOGETHER)):
            found = iter(self._library.encode_batch_fast([part for part in batch if isinstance(part, str)]))
            for part in batch:
                if isinstance(part, str):
                    yield np.array(next(found).ids, dtype=np.int64)
                else:
                    yield self._single[np.frombuffer(part, dtype=np.uint8)]


def train_tokenizer(texts: Iterable[bytes], vocab: int) -> str:
    """Train a byte-level BPE: all bytes, then the most frequent pairs, and END as token 0.

    Args:
        texts: what it learns from; bytes that are no UTF-8 count as the replacement character.
        vocab: number of symbols; fewer where the texts have fewer pairs.

    Returns:
        The content of a tokenizer.json; the same texts give the same.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=sorted(ALPHABET), show_progress=False
    )
    strings = (piece.decode(errors="replace") for text in texts for piece in cut_between_words(text))
    tokenizer.train_from_iterator(strings, trainer)
    return tokenizer.to_str(pretty=True)


def load_coder(folder: Path, vocab: int) -> Coder:
    """What the tokens of a run mean: its folder has a tokenizer.json, or they are bytes.

    Args:
        folder: the run's.
        vocab: symbols of its model.

    Raises:
        ValueError: the vocabularies differ, tokenizer.json is damaged, or `tokenizers` is not installed.
    """
    path = folder / FILE
    coder = Tokenizer(path.read_text(encoding="utf-8")) if path.is_file() else ByteCoder()
    if coder.vocab != vocab:
        what = f"{path} has {coder.vocab}" if path.is_file() else f"{path} is missing, and bytes have 256"
        raise ValueError(f"the model in {folder} has {vocab} symbols, but {what}")
    return coder


def cut_between_words(text: bytes, size: int = PIECE) -> Iterator[bytes]:
    """Pieces of about `size` bytes, cut before a single blank between two ASCII characters.

    The tokenizer never joins a word with what stands before its blank, so the pieces' tokens are the text's.
    """
    start = 0
    while start < len(text):
        found = BETWEEN_WORDS.search(text, start + size)
        stop = found.start() if found else len(text)
        yield text[start:stop]
        start = stop


def _parts(text: bytes) -> Iterator[str | bytes]:
    """Pieces of a text, as strings, and the bytes between them that are no UTF-8."""
    for piece in cut_between_words(text):
        for number, part in enumerate(ODD.split(piece.decode("utf-8", "surrogateescape"))):
            if part:
                yield part.encode("utf-8", "surrogateescape") if number % 2 else part


def _added(token: Any) -> bytes:
    """What a token beside the trained ones stands for."""
    return b"" if token.special else token.content.encode()


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself where it shows, else the next one from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return {chr(value): value for value in shown} | {chr(256 + n): value for n, value in enumerate(hidden)}


ALPHABET = _alphabet()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "--data.encoding bpe needs the package tokenizers: pip install 'chela[data]', or take bytes"
        ) from None
    return tokenizers
