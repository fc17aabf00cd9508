"""Texts as bytes or as characters: the two encodings of Long Range Arena's Text and Retrieval.

Bytes (LRA): byte + 1, 0 is padding. Characters (S4, S5): 0 padding, 1 unknown, 2 end of text, then the code points of
the training texts in order; every text ends in 2.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from chela.data.cache import Arrays
from chela.data.ragged import Sequences

UNKNOWN, END, FIRST = 1, 2, 3
BYTES = 257
"""Symbols of the byte encoding, padding included."""
CODE_POINTS = 0x110000


def pack(texts: Iterable[bytes]) -> Arrays:
    """Texts one behind the other: tokens uint8 [total], ends int64 [N]."""
    kept = list(texts)
    ends = np.cumsum([len(text) for text in kept], dtype=np.int64)
    return {"tokens": np.frombuffer(b"".join(kept), dtype=np.uint8), "ends": ends}


def unpack(packed: Arrays) -> Iterable[bytes]:
    """The texts of `pack` again, one by one."""
    start = 0
    for end in packed["ends"].tolist():
        yield bytes(packed["tokens"][start:end])
        start = end


def vocabulary(texts: Iterable[bytes], *, limit: int, floor: int = 1) -> np.ndarray:
    """Characters that get a symbol of their own.

    Args:
        texts: UTF-8.
        limit: characters of a text that count.
        floor: a character seen less often is left out.

    Returns:
        Code points in order, uint32 [symbols - 3].
    """
    counts = np.zeros(CODE_POINTS, dtype=np.int64)
    for text in texts:
        found, times = np.unique(_code_points(text)[:limit], return_counts=True)
        counts[found] += times
    return np.flatnonzero(counts >= floor).astype(np.uint32)


def encode(texts: Iterable[bytes], known: np.ndarray) -> Arrays:
    """Texts as symbols of a vocabulary, one behind the other, without their ends: tokens [total], ends int64 [N]."""
    table = np.full(CODE_POINTS, UNKNOWN, dtype=np.min_scalar_type(len(known) + FIRST))
    table[known] = np.arange(FIRST, len(known) + FIRST)
    rows = [table[_code_points(text)] for text in texts]
    return {"tokens": np.concatenate(rows), "ends": np.cumsum([len(row) for row in rows], dtype=np.int64)}


@dataclass(frozen=True)
class TextEncoding:
    """How a task's texts have become tokens."""

    known: np.ndarray | None = None
    """Characters with a symbol of their own; None for bytes."""

    @property
    def vocab(self) -> int:
        """Symbols, padding included."""
        return BYTES if self.known is None else len(self.known) + FIRST

    def sequences(self, packed: Arrays, limit: int) -> Sequences:
        """The texts as sequences of at most `limit` steps, the end of a text included."""
        shift, last = (1, 0) if self.known is None else (0, END)
        return Sequences(packed["tokens"], packed["ends"], shift=shift, last=last, limit=limit)

    def decode(self, tokens: np.ndarray) -> str:
        """The text again; what has no symbol becomes U+FFFD."""
        if self.known is None:
            return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode(errors="replace")
        points = np.concatenate([[0, 0xFFFD, 0], self.known])[tokens]
        return "".join(map(chr, points[points > 0]))


def _code_points(text: bytes) -> np.ndarray:
    return np.frombuffer(text.decode(errors="replace").encode("utf-32-le"), dtype=np.uint32)
