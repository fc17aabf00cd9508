"""Sharded token files: a JSON header, raw shards, and the ends of the documents.

A folder holds

- `tokens.json`: `format` ("chela-tokens"), `version` (1), `dtype` ("uint8", "uint16" or "uint32"), `vocab`, the counts
  `tokens`, `documents`, `bytes` and `words` of the text they stand for (0: not known), `shards`, a list of `file`,
  `tokens` and `sha256`, and `ends`, with `file` and `sha256`;
- the shards, token after token in little-endian order and nothing else, to be read one behind the other; where a shard
  begins and ends means nothing;
- the ends of the documents, little-endian int64, in ascending order; the last is the number of tokens.

The header is written last: a folder without one holds no token files.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from chela.disk import sync, write_synced

HEADER, ENDS, FORMAT, VERSION = "tokens.json", "ends.bin", "chela-tokens", 1
SHARD_TOKENS = 1 << 28
BLOCK = 1 << 24
"""Tokens that are checked at a time."""


class TokenWriter:
    """Writes token files; leave its `with` block without an error and they are whole.

    Args:
        folder: an empty folder.
        vocab: number of symbols; the tokens take the narrowest of uint8, uint16 and uint32 that holds them.
        shard_tokens: tokens a shard.
    """

    def __init__(self, folder: Path, vocab: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._vocab, self._room = folder, vocab, shard_tokens
        self._dtype = np.dtype(f"<u{1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 4}")
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._tokens = self._bytes = self._words = 0
        self._ends: list[int] = []

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_shard()
        if kind is None:
            self._finish()

    def add(self, tokens: np.ndarray, *, size: int = 0, words: int = 0) -> None:
        """Append tokens [n] to the document under way.

        Args:
            tokens: integers.
            size: bytes of text that they stand for.
            words: words of it.

        Raises:
            ValueError: a token is outside the vocabulary.
        """
        check_tokens(tokens, self._vocab, "the tokens to be written")
        tokens = tokens.astype(self._dtype)
        self._bytes, self._words = self._bytes + size, self._words + words
        while len(tokens):
            if self._file is None:
                self._shards.append({"file": f"{len(self._shards):05d}.bin", "tokens": 0})
                self._file = (self._folder / self._shards[-1]["file"]).open("wb")
            shard = self._shards[-1]
            part, tokens = np.split(tokens, [self._room - shard["tokens"]])
            self._file.write(part.tobytes())
            self._digest.update(part.tobytes())
            shard["tokens"] += len(part)
            self._tokens += len(part)
            if shard["tokens"] == self._room:
                self._end_shard()

    def end(self) -> None:
        """End the document under way; one without tokens is left out."""
        if self._tokens > (self._ends[-1] if self._ends else 0):
            self._ends.append(self._tokens)

    def _end_shard(self) -> None:
        if self._file is not None:
            sync(self._file)
            self._file.close()
            self._shards[-1]["sha256"] = self._digest.hexdigest()
            self._file, self._digest = None, hashlib.sha256()

    def _finish(self) -> None:
        self.end()
        ends = np.array(self._ends, dtype="<i8").tobytes()
        header = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": f"uint{8 * self._dtype.itemsize}",
            "vocab": self._vocab,
            "tokens": self._tokens,
            "documents": len(self._ends),
            "bytes": self._bytes,
            "words": self._words,
            "shards": self._shards,
            "ends": {"file": ENDS, "sha256": hashlib.sha256(ends).hexdigest()},
        }
        for name, content in ((ENDS, ends), (HEADER, json.dumps(header, indent=1).encode())):
            write_synced(self._folder / name, content)


@dataclass(frozen=True)
class Shard:
    """A shard as the header names it."""

    path: Path
    tokens: np.ndarray
    """Memory-mapped, [n]."""
    sha256: str


class TokenFiles:
    """Token files, memory-mapped: `tokens[start:stop]` reads what is asked for and no more.

    Args:
        folder: as `TokenWriter` leaves it.

    Raises:
        ValueError: the header is missing or not one, a type or size is not what it says, or the ends do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            header = json.loads((folder / HEADER).read_bytes())
            named = header["format"], header["version"]
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no token files: {HEADER} is missing") from None
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{folder / HEADER} is damaged, or no header of token files") from None
        if named != (FORMAT, VERSION):
            raise ValueError(f"{folder / HEADER} has format {named[0]} {named[1]}, wanted {FORMAT} {VERSION}")
        try:
            self._read(header)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / HEADER} is damaged: {error} is missing, or not what it should be") from None

    def _read(self, header: dict[str, Any]) -> None:
        kind, where = header["dtype"], self.folder / HEADER
        if kind not in ("uint8", "uint16", "uint32"):
            raise ValueError(f"{where} has dtype {kind!r}, wanted uint8, uint16 or uint32")
        dtype = np.dtype(kind).newbyteorder("<")
        self.vocab: int = header["vocab"]
        self.bytes: int = header["bytes"]
        self.words: int = header["words"]
        if not 1 <= self.vocab <= 1 << 8 * dtype.itemsize:
            raise ValueError(f"{where} has a vocabulary of {self.vocab}, which does not fit {kind}")
        self._shards = [
            Shard(path, _map(path, dtype, shard["tokens"]), shard["sha256"])
            for shard in header["shards"]
            for path in [self.folder / Path(shard["file"]).name]
        ]
        self._stops = np.cumsum([len(shard.tokens) for shard in self._shards], dtype=np.int64)
        self._ends_sha256: str = header["ends"]["sha256"]
        ends = self.folder / Path(header["ends"]["file"]).name
        self.ends = _map(ends, np.dtype("<i8"), header["documents"])
        """End of each document, int64 [documents]."""
        if len(self) != header["tokens"]:
            raise ValueError(f"{where} counts {header['tokens']:,} tokens, but its shards {len(self):,}")
        if (np.diff(self.ends, prepend=0) <= 0).any() or len(self) != (self.ends[-1] if len(self.ends) else 0):
            raise ValueError(f"{ends} is damaged: the ends of documents must ascend to {len(self):,}, the last token")

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """The tokens of a span of step 1, in the type of the files.

        Raises:
            ValueError: one of them is outside the vocabulary.
        """
        start, stop, step = span.indices(len(self))
        assert step == 1
        first = int(np.searchsorted(self._stops, start, side="right"))
        parts = []
        while start < stop:
            shard = self._shards[first].tokens
            before = int(self._stops[first]) - len(shard)
            parts.append(shard[start - before : stop - before])
            start, first = before + len(shard), first + 1
        tokens = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.uint8), *parts])
        check_tokens(tokens, self.vocab, str(self.folder))
        return tokens

    def verify(self) -> None:
        """Read everything: checksums of all files, and every token.

        Raises:
            ValueError: names the file that was changed, or holds a token outside the vocabulary.
        """
        for path, content, sha256 in (
            *((shard.path, shard.tokens, shard.sha256) for shard in self._shards),
            (self.folder / ENDS, self.ends, self._ends_sha256),
        ):
            digest = hashlib.sha256()
            for start in range(0, len(content), BLOCK):
                digest.update(content[start : start + BLOCK].tobytes())
            if digest.hexdigest() != sha256:
                raise ValueError(f"{path} was changed since it was written: its checksum is not that of the header")
        for start in range(0, len(self), BLOCK):
            self[start : start + BLOCK]


def check_tokens(tokens: np.ndarray, vocab: int, where: str) -> None:
    """Refuse tokens that are not 0 to vocab - 1.

    Raises:
        ValueError: names one of them and `where`.
    """
    if tokens.dtype.kind == "u" and vocab == 1 << 8 * tokens.dtype.itemsize:
        return
    if len(tokens) and (int(tokens.max()) >= vocab or int(tokens.min()) < 0):
        wrong = tokens[(tokens >= vocab) | (tokens < 0)][0]
        raise ValueError(f"{where}: token {int(wrong)} is outside the vocabulary 0..{vocab - 1}")


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The numbers of a raw file, which must hold `count` of them."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, but {HEADER} names it") from None
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, but {count:,} numbers of {dtype.itemsize} bytes are wanted: it was cut off, "
            f"or {HEADER} has the wrong type"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)
