"""IMDB reviews as bytes or characters (LRA Text): the folder of text files as published, or one table a split."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.cache import Arrays, prepared
from chela.data.characters import TextEncoding, encode, pack, unpack, vocabulary
from chela.data.find import find_folder, objects, stamp
from chela.data.task import Task, differs, entropy, majority

MAX_LENGTH = {"bytes": 4000, "characters": 4096}
"""Steps of a review that are read; the last of 4,096 characters is the end of the text."""
FLOOR = 15
"""A character seen less often in training is unknown (S4, S5)."""
PUBLISHED = {"train": (25_000, 33_132_823), "test": (25_000, 32_350_685)}
"""Reviews, and their bytes."""
TABLES = (".jsonl", ".jsonl.xz", ".parquet")
WANTED = (
    "the folders train/neg, train/pos, test/neg and test/pos of aclImdb_v1.tar.gz "
    "(https://ai.stanford.edu/~amaas/data/sentiment/), or train and test as .jsonl, .jsonl.xz or .parquet "
    "with the columns text and label (0 negative, 1 positive)"
)


def load(config: DataConfig, progress: Callable[[str], None] | None) -> Task:
    """Bytes (LRA) or characters (S4, S5), 2 classes; a tenth of the training reviews is held out for validation.

    Raises:
        ValueError: files missing, malformed, or with labels other than 0 and 1.
    """
    folder = find_folder(config.root, ("text", "aclImdb", "imdb"), _complete, "text", WANTED)
    sources = {name: _table(folder, name) or folder / name for name in ("train", "test")}
    parts, note = {}, ""
    for name, source in sources.items():

        def make(source: Path = source) -> Arrays:
            if progress:
                progress(f"text: reading {source.name}")
            return _pack(_reviews(source), source)

        parts[name] = prepared(config.root, f"text-{name}", {"source": stamp(source)}, make)
        reviews, size = PUBLISHED[name]
        note += differs(f"{name} reviews", len(parts[name]["labels"]), reviews) or differs(
            f"bytes in the {name} reviews", len(parts[name]["tokens"]), size
        )
    labels, test_labels = (np.asarray(parts[name]["labels"]) for name in ("train", "test"))
    encoding = TextEncoding()
    if config.encoding == "characters":
        key = {"sources": [stamp(source) for source in sources.values()], "floor": FLOOR}
        encoded = prepared(config.root, "text-characters", key, lambda: _as_characters(parts))
        encoding = TextEncoding(encoded["vocabulary"])
        parts = {name: {k: encoded[f"{name}_{k}"] for k in ("tokens", "ends")} for name in parts}
    if len(labels) < 10:
        raise ValueError(f"{sources['train']} holds {len(labels)} reviews: 10 at least, a tenth is for validation")
    limit = config.max_length or MAX_LENGTH[config.encoding]
    order = np.random.default_rng([config.seed, len(labels)]).permutation(len(labels))
    cut = len(labels) - len(labels) // 10
    train, val = (np.sort(rows) for rows in (order[:cut], order[cut:]))
    return Task(
        name="text",
        kind="classifier",
        train=encoding.sequences(_select(parts["train"], train), limit).labelled(labels[train]),
        val=encoding.sequences(_select(parts["train"], val), limit).labelled(labels[val]),
        test=encoding.sequences(parts["test"], limit).labelled(test_labels),
        inputs="tokens",
        vocab=encoding.vocab,
        classes=2,
        names=("negative", "positive"),
        decode=encoding.decode,
        max_length=limit,
        baselines={"majority class": majority(labels[train], test_labels)},
        chance_loss=entropy(labels[train]),
        note=f"validation is a tenth of the training reviews; published results selected on the test reviews{note}",
    )


def _as_characters(parts: dict[str, Arrays]) -> Arrays:
    known = vocabulary(unpack(parts["train"]), limit=MAX_LENGTH["characters"] - 1, floor=FLOOR)
    encoded = {name: encode(unpack(part), known) for name, part in parts.items()}
    return {"vocabulary": known} | {f"{name}_{k}": array for name, part in encoded.items() for k, array in part.items()}


def _select(part: Arrays, rows: np.ndarray) -> Arrays:
    """Some of the sequences, one behind the other."""
    starts = np.concatenate([[0], part["ends"]])
    pieces = [part["tokens"][starts[row] : starts[row + 1]] for row in rows]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return {"tokens": np.concatenate(pieces), "ends": ends}


def _table(folder: Path, name: str) -> Path | None:
    return next((folder / f"{name}{end}" for end in TABLES if (folder / f"{name}{end}").is_file()), None)


def _complete(folder: Path) -> bool:
    return all(
        _table(folder, name) is not None or all((folder / name / side).is_dir() for side in ("neg", "pos"))
        for name in ("train", "test")
    )


def _reviews(source: Path) -> Iterator[tuple[bytes, int]]:
    """(text, label) of every review, in the order of the files."""
    if source.is_dir():
        for label, side in enumerate(("neg", "pos")):
            files = sorted((source / side).glob("*.txt"), key=lambda path: (len(path.name), path.name))
            yield from ((path.read_bytes(), label) for path in files)
    elif source.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{source} needs the package pyarrow: pip install 'chela[data]'") from None
        try:
            table = parquet.read_table(source, columns=["text", "label"]).to_pydict()
            rows = list(zip(table["text"], table["label"], strict=True))
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"{source} is damaged, or lacks the columns text and label ({error})") from None
        for number, (text, label) in enumerate(rows, 1):
            if not isinstance(text, str):
                raise ValueError(f"{source} row {number} has no text")
            yield text.encode(), label
    else:
        for text, label in objects(source, {"text": str, "label": int}):
            yield text.encode(errors="replace"), label


def _pack(reviews: Iterator[tuple[bytes, int]], source: Path) -> Arrays:
    texts, labels = [], []
    for text, label in reviews:
        if label not in (0, 1):
            raise ValueError(f"{source}: review {len(texts) + 1} has label {label!r}, wanted 0 or 1")
        texts.append(text)
        labels.append(label)
    if not texts:
        raise ValueError(f"{source} holds no reviews")
    return {**pack(texts), "labels": np.array(labels, dtype=np.uint8)}
