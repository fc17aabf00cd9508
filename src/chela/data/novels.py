"""English novels of 1839 to 1919, a corpus of our own making; a document is a book."""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from chela.data.corpora import PARTS, Corpus, read
from chela.data.find import find_folder, stamp

SHA256 = {
    "train": "b429b56175cd47ecdd8751ff258bcd7a428fbd2da2a1a1edd00f8f345f833526",
    "valid": "60336c3af2e29fe9983182c930ad7ea267aaa1b8d067bd0485be357df4f079dd",
    "test": "116d25636c3548014357b80ee7106fc05d67b4f4e5f159096fb338b29209dc3b",
}
"""Of each part's books, one behind the other."""
LAST_YEAR, LEFT_OUT = 1919, "Forster_"
"""Books are in the public domain: published by then, and not by E. M. Forster, who died in 1970."""
WANTED = (
    "a copy of https://github.com/computationalstylistics/100_english_novels (version 1.4: the folder corpus of .txt "
    "files), or the same books packed as train.txt, valid.txt and test.txt (also .txt.xz) with books.json"
)


def novels(root: Path) -> Corpus:
    """86 novels, 60.3 / 5.0 / 3.4 million bytes.

    Raises:
        ValueError: files missing, or books.json is damaged. (Checksums are looked at when the books are read.)
    """
    folder = find_folder(root, ("novels", "english_novels", "100_english_novels"), _complete, "novels", WANTED)
    if (folder / "corpus").is_dir():
        files = split((folder / "corpus").glob("*.txt"))
        parts = {part: partial(_read, part, paths) for part, paths in files.items()}
        key = {part: [stamp(path) for path in paths] for part, paths in files.items()}
    else:
        packed = {part: path for part in PARTS if (path := _packed(folder, part))}
        ends = _ends(folder / "books.json")
        parts = {part: partial(_cut, part, path, ends[part]) for part, path in packed.items()}
        key = {part: [stamp(path), stamp(folder / "books.json")] for part, path in packed.items()}
    return Corpus(
        "novels",
        parts,
        key,
        "its own corpus: bits per byte are comparable with none of enwik8, text8, WikiText and PG-19; "
        "books are in one part alone, authors recur",
        words=lambda text: len(text.split()),
    )


def split(books: Iterator[Path]) -> dict[str, list[Path]]:
    """Books `Author_Title_Year.txt` by part: by the SHA-256 of their names, 5 test, 5 valid, and the rest train."""
    known = [book for book in books if int(re.sub(r"\D", "", book.stem[-4:]) or 9999) <= LAST_YEAR]
    order = sorted(known, key=lambda book: hashlib.sha256(book.name.encode()).hexdigest())
    parts = {"train": order[10:], "valid": order[5:10], "test": order[:5]}
    kept = {part: sorted(book for book in found if not book.name.startswith(LEFT_OUT)) for part, found in parts.items()}
    if not all(kept.values()):
        raise ValueError(f"{len(known)} novels up to {LAST_YEAR} were found, 89 are wanted: get {WANTED}")
    return kept


def _read(part: str, books: list[Path]) -> Iterator[bytes]:
    """Books without byte-order mark and with plain ends of lines."""
    texts = (book.read_bytes().removeprefix(b"\xef\xbb\xbf") for book in books)
    yield from _checked(part, (text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") for text in texts), books[0].parent)


def _cut(part: str, path: Path, ends: list[int]) -> Iterator[bytes]:
    text = read(path)
    if not ends or ends[-1] != len(text):
        raise ValueError(f"{path} has {len(text):,} bytes, but books.json another number: get both again")
    starts = [0, *ends[:-1]]
    yield from _checked(part, (text[start:stop] for start, stop in zip(starts, ends, strict=True)), path)


def _checked(part: str, texts: Iterator[bytes], source: Path) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text)
        yield text
    if digest.hexdigest() != SHA256[part]:
        raise ValueError(
            f"{source} does not hold the {part} books of this corpus: their checksum differs; get {WANTED}"
        )


def _ends(path: Path) -> dict[str, list[int]]:
    ends: dict[str, list[int]] = {part: [] for part in PARTS}
    try:
        for book in json.loads(path.read_bytes()):
            ends[book["split"]].append(int(book["end"]))
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is damaged: get it again") from None
    return ends


def _packed(folder: Path, part: str) -> Path | None:
    return next((folder / f"{part}{end}" for end in (".txt", ".txt.xz") if (folder / f"{part}{end}").is_file()), None)


def _complete(folder: Path) -> bool:
    packed = (folder / "books.json").is_file() and all(_packed(folder, part) for part in PARTS)
    return packed or (folder / "corpus").is_dir()
