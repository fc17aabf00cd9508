"""Tasks of language models: a corpus as token files, by bytes or by a tokenizer trained on it, in windows or packed."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import StreamSplit, TextMeasure
from chela.data.cache import SECONDS, prepared_folder
from chela.data.corpora import PARTS, Corpus
from chela.data.packed import PackedSplit
from chela.data.task import Task, differs
from chela.data.token_files import TokenFiles, TokenWriter
from chela.data.tokenizer import FILE, ByteCoder, Coder, Tokenizer, cut_between_words, train_tokenizer
from chela.disk import write_synced

MAX_LENGTH = 1024
VOCAB = 16_384
LEARNED = 1 << 30
"""Bytes that a tokenizer is trained on at most, in pieces spread evenly over the training part."""
SPREAD = 1 << 20
"""Size of such a piece, and of those in which a document is written."""

Progress = Callable[[str], None] | None


def load(config: DataConfig, progress: Progress, open_corpus: Callable[[Path], Corpus]) -> Task:
    """A corpus as windows of `data.max_length` tokens, or as rows of so many that hold whole documents.

    Args:
        config: settings; encoding "bytes" (vocabulary 256) or "bpe" (`data.vocab` symbols).
        progress: told now and then.
        open_corpus: finds the corpus in a data root.

    Raises:
        ValueError: files missing, damaged or too short.
    """
    corpus = open_corpus(config.root)
    tokenizer = _tokenizer(config, corpus, progress) if config.encoding == "bpe" else ""
    coder = Tokenizer(tokenizer) if tokenizer else ByteCoder()
    token_bytes = np.array([len(piece) for piece in coder.pieces], dtype=np.int64)
    note, splits = corpus.note, {}
    for part in PARTS:
        tokens = _tokens(config.root, corpus, part, coder, tokenizer, progress)
        documents, words = corpus.published.get(part, (0, 0))
        wrong = differs(f"{part} documents", len(tokens.ends), documents) if documents else ""
        note += wrong or (differs(f"words in the {part} part", tokens.words, words) if words and not documents else "")
        text = TextMeasure(
            token_bytes,
            bytes=tokens.bytes,
            # whoever has all the books divides by the published number of words, as the field does
            words=words if documents and not wrong else tokens.words,
            documents=len(tokens.ends),
            tokens=len(tokens),
        )
        splits[part] = make_split(tokens, config, text)
    train, val, test = (splits[part] for part in PARTS)
    return Task(
        name=corpus.name,
        kind="causal-lm",
        train=train,
        val=val,
        test=test,
        inputs="tokens",
        vocab=coder.vocab,
        max_length=config.max_length or MAX_LENGTH,
        decode=coder.decode,
        chance_loss=math.log(coder.vocab),
        note=note,
        tokenizer=tokenizer,
    )


def make_split(tokens: TokenFiles, config: DataConfig, text: TextMeasure | None) -> StreamSplit | PackedSplit:
    """Token files as windows or, with `data.packed`, as rows of whole documents."""
    room = config.max_length or MAX_LENGTH
    return PackedSplit(tokens, tokens.ends, room, text) if config.packed else StreamSplit(tokens, room, text)


def _tokenizer(config: DataConfig, corpus: Corpus, progress: Progress) -> str:
    """The tokenizer trained on the corpus's training part, as the content of its file."""
    vocab = config.vocab or VOCAB

    def write(folder: Path) -> None:
        sizes = sum(len(text) for text in corpus.parts["train"]())
        every = max(1, -(-sizes // LEARNED))
        pieces = (piece for text in corpus.parts["train"]() for piece in cut_between_words(text, SPREAD))
        chosen = (piece for number, piece in enumerate(pieces) if number % every == 0)
        told = _Told(progress, f"{corpus.name}: a tokenizer of {vocab:,} symbols", min(sizes, LEARNED))
        write_synced(folder / FILE, train_tokenizer(told.through(chosen), vocab).encode())

    folder = prepared_folder(config.root, f"{corpus.name}-bpe", {"source": corpus.key["train"], "vocab": vocab}, write)
    try:
        return (folder / FILE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"prepared data are damaged ({error}): delete {folder} and they are made again") from None


def _tokens(root: Path, corpus: Corpus, part: str, coder: Coder, tokenizer: str, progress: Progress) -> TokenFiles:
    """A part of the corpus as token files."""
    kind = "bpe" if tokenizer else "bytes"
    key = {"source": corpus.key[part], "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(), "layout": 1}

    def write(folder: Path) -> None:
        told = _Told(progress, f"{corpus.name}: {part} part as {kind}")
        with TokenWriter(folder, coder.vocab) as writer:
            for text in corpus.parts[part]():
                for piece in told.through(cut_between_words(text, SPREAD)):
                    writer.add(coder.encode(piece), size=len(piece))
                writer.add(_ending(coder), words=corpus.words(text) if corpus.words else 0)
                writer.end()

    folder = prepared_folder(root, f"{corpus.name}-{part}-{kind}", key, write)
    try:
        tokens = TokenFiles(folder)
    except ValueError as error:
        raise ValueError(f"prepared data are damaged ({error}): delete {folder} and they are made again") from None
    if len(tokens) < 2:
        raise ValueError(f"the {part} part of {corpus.name} has {len(tokens)} tokens: at least 2 are needed")
    return tokens


def _ending(coder: Coder) -> np.ndarray:
    return np.array([] if coder.end is None else [coder.end], dtype=np.int64)


class _Told:
    """Tells now and then how much of a text has gone through."""

    def __init__(self, progress: Progress, what: str, total: int = 0) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._done, self._last = 0, time.monotonic()

    def through(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The pieces as they come."""
        for piece in pieces:
            yield piece
            self._done += len(piece)
            if self._progress and time.monotonic() - self._last > SECONDS:
                of = f" of {self._total / 1e6:,.0f}" if self._total else ""
                self._progress(f"{self._what}, {self._done / 1e6:,.0f}{of} MB")
                self._last = time.monotonic()
