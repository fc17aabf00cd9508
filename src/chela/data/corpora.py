"""The published corpora of language modelling, and texts of your own: three parts of documents each, as bytes."""

import hashlib
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from chela.data.find import find_folder, objects, stamp

PARTS = ("train", "valid", "test")
Documents = Callable[[], Iterator[bytes]]
Count = Callable[[bytes], int]

MILLION = 1_000_000
HUNDRED = {
    "enwik8": (100 * MILLION, "a1fa5ffddb56f4953e226637dabbb36a"),
    "text8": (100 * MILLION, "3bea1919949baf155f99411df5fada7e"),
}
"""Bytes and MD5 of the published files; 90 % are for training, then 5 % and 5 %."""
WIKITEXT = {
    "wikitext-2": (2_088_628, 217_646, 245_569),
    "wikitext-103": (103_227_021, 217_646, 245_569),
}
"""Published number of words of each part, the end of a line being one."""
PG19 = {"train": (28_602, 1_973_136_207), "valid": (50, 3_007_061), "test": (100, 6_966_499)}
"""Published number of books and of words of each part."""
PG19_FOLDERS = {"train": "train", "valid": "validation", "test": "test"}
ARTICLE = re.compile(rb"(?:\A|(?<=\n)) ?\n = [^=\n](?:.*[^=\n])? = \n(?= ?\n)")


@dataclass(frozen=True)
class Corpus:
    """A text in three parts."""

    name: str
    """As on the command line."""
    parts: dict[str, Documents]
    """Documents of "train", "valid" and "test", read anew with each call; malformed files raise `ValueError`."""
    key: dict[str, list[Any]]
    """What each part depends on."""
    note: str
    """What a reader must know of it."""
    words: Count | None = None
    """Counts words as its published results do; None where these are in bits per byte or character."""
    published: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Documents (0: not known) and words of the published parts."""


def hundred_million(name: str, root: Path) -> Corpus:
    """enwik8 or text8: the first 90 million bytes, the next 5 and the last 5, each one long document.

    Raises:
        ValueError: no file, or one that is not as long as the published one. (Its MD5 is looked at when it is read.)
    """
    size, _ = HUNDRED[name]
    wanted = f"the file {name} or {name}.zip (http://mattmahoney.net/dc/{name}.zip)"

    def found(folder: Path) -> Path | None:
        return _either(folder, name, f"{name}.zip")

    path = found(find_folder(root, (name,), lambda folder: found(folder) is not None, name, wanted))
    assert path is not None
    spans = {"train": (0, size * 9 // 10), "valid": (size * 9 // 10, size * 19 // 20), "test": (size * 19 // 20, size)}
    return Corpus(
        name,
        {part: partial(_span, name, path, *span) for part, span in spans.items()},
        {part: [*stamp(path), *span] for part, span in spans.items()},
        "the first 90 million bytes for training, 5 million for validation, the last 5 million for the test",
    )


def _span(name: str, path: Path, start: int, stop: int) -> Iterator[bytes]:
    size, md5 = HUNDRED[name]
    content = read(path, name)
    if len(content) != size:
        raise ValueError(f"{path} has {len(content):,} bytes, but {name} has {size:,}: it was cut off, get it again")
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path} is not {name}: its MD5 is not {md5}, get it again")
    yield content[start:stop]


def wikitext(name: str, root: Path) -> Corpus:
    """WikiText-2 or -103, with unknown words replaced (`.tokens`) or raw (`.raw`); a document is an article.

    Args:
        name: wikitext-2, wikitext-2-raw, wikitext-103 or wikitext-103-raw.
        root: data root.

    Raises:
        ValueError: files missing.
    """
    end = "raw" if name.endswith("-raw") else "tokens"
    files = {part: f"wiki.{part}.{end}" for part in PARTS}
    archive = f"{name}-v1.zip"

    def complete(folder: Path) -> bool:
        return (folder / archive).is_file() or all((folder / file).is_file() for file in files.values())

    wanted = f"{', '.join(files.values())} or {archive} (https://wikitext.smerity.com/{archive})"
    folder = find_folder(root, (name,), complete, name, wanted)
    paths = {part: folder / file if (folder / file).is_file() else folder / archive for part, file in files.items()}
    counts = WIKITEXT[name.removesuffix("-raw")]
    return Corpus(
        name,
        {part: partial(_articles, paths[part], f"{name}/{files[part]}") for part in PARTS},
        {part: stamp(path) for part, path in paths.items()},
        "the published parts" + (", rare words replaced by <unk>" if end == "tokens" else ""),
        words=lambda text: len(text.split()) + text.count(b"\n"),
        published={part: (0, count) for part, count in zip(PARTS, counts, strict=True)},
    )


def _articles(path: Path, inside: str) -> Iterator[bytes]:
    """The articles of a WikiText file, whole: each begins with a blank line and ` = Its title = `."""
    text = read(path, inside)
    starts = [found.start() for found in ARTICLE.finditer(text)]
    cuts = [0, *[start for start in starts if start > 0], len(text)]
    for start, stop in pairwise(cuts):
        yield text[start:stop]


def pg19(root: Path) -> Corpus:
    """PG-19 (Rae et al. 2019): a document is a book, in the order of the files' names.

    Raises:
        ValueError: folders missing.
    """
    wanted = (
        "the folders train, validation and test of .txt files "
        "(https://console.cloud.google.com/storage/browser/deepmind-gutenberg)"
    )

    def complete(folder: Path) -> bool:
        return all(next((folder / name).glob("*.txt"), None) for name in PG19_FOLDERS.values())

    folder = find_folder(root, ("pg19", "pg-19", "deepmind-gutenberg"), complete, "pg19", wanted)
    books = {part: sorted((folder / name).glob("*.txt")) for part, name in PG19_FOLDERS.items()}

    def texts(part: str) -> Iterator[bytes]:
        yield from (book.read_bytes() for book in books[part])

    return Corpus(
        "pg19",
        {part: partial(texts, part) for part in PARTS},
        {part: [stamp(book) for book in paths] for part, paths in books.items()},
        "the published parts",
        words=lambda text: len(text.split()),
        published=PG19,
    )


def own_texts(root: Path) -> Corpus:
    """Texts of the user's own: one document a file, or one a line where they are JSON lines.

    Raises:
        ValueError: files missing.
    """
    ends = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")

    def path(folder: Path, part: str) -> Path | None:
        return _either(folder, *(f"{part}{end}" for end in ends))

    wanted = (
        "train.txt, valid.txt and test.txt (any text of yours, UTF-8 or not; also .txt.xz; or .jsonl and .jsonl.xz, "
        'an object a line with the document as "text")'
    )
    folder = find_folder(root, ("bytes",), lambda folder: all(path(folder, part) for part in PARTS), "bytes", wanted)
    paths = {part: path(folder, part) for part in PARTS}

    def texts(part: str) -> Iterator[bytes]:
        source = paths[part]
        assert source is not None
        if ".jsonl" in source.suffixes:
            yield from (text.encode(errors="replace") for (text,) in objects(source, {"text": str}))
        else:
            yield read(source)

    return Corpus(
        "bytes",
        {part: partial(texts, part) for part in PARTS},
        {part: stamp(source) for part, source in paths.items() if source},
        f"the text in {folder.name}",
    )


def read(path: Path, inside: str = "") -> bytes:
    """The bytes of a file, plain, .xz, or the member of a .zip that is called `inside` (or as its last part is).

    Raises:
        ValueError: cut off, damaged, or a .zip without that member.
    """
    try:
        if path.suffix == ".zip":
            with ZipFile(path) as file:
                last = inside.rsplit("/", 1)[-1]
                member = next((name for name in file.namelist() if name.rsplit("/", 1)[-1] == last), None)
                if member is None:
                    raise ValueError(f"{path} holds no {last}: get it again")
                return file.read(member)
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None


def _either(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
