"""IMDB reviews as bytes (LRA Text): the folder of text files as published, or one table a split."""

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import RaggedSplit
from chela.data.cache import Arrays, prepared
from chela.data.find import find_folder
from chela.data.task import Task, entropy, majority

MAX_LENGTH = 4000
"""Bytes of a review that are read."""
TABLES = (".jsonl", ".jsonl.xz", ".parquet")
WANTED = (
    "the folders train/neg, train/pos, test/neg and test/pos of aclImdb_v1.tar.gz "
    "(https://ai.stanford.edu/~amaas/data/sentiment/), or train and test as .jsonl, .jsonl.xz or .parquet "
    "with the columns text and label (0 negative, 1 positive)"
)


def load(config: DataConfig, progress: Callable[[str], None] | None) -> Task:
    """Bytes plus one (0 is padding), 2 classes; a tenth of the training reviews is held out for validation.

    Raises:
        ValueError: files missing, malformed, or with labels other than 0 and 1.
    """
    folder = find_folder(config.root, ("text", "aclImdb", "imdb"), _complete, "text", WANTED)
    parts = {}
    for name in ("train", "test"):
        table = _table(folder, name)
        source = folder / name if table is None else table
        key = {"source": str(source), "size": source.stat().st_size, "time": source.stat().st_mtime_ns}

        def make(source: Path = source) -> Arrays:
            if progress:
                progress(f"text: reading {source.name}")
            return _pack(_reviews(source), source)

        parts[name] = prepared(config.root, f"text-{name}", key, make)
    limit = config.max_length or MAX_LENGTH
    whole = RaggedSplit(parts["train"]["tokens"], parts["train"]["ends"], parts["train"]["labels"])
    order = np.random.default_rng([config.seed, len(whole)]).permutation(len(whole))
    cut = len(whole) - len(whole) // 10
    train, val = (_select(whole, np.sort(rows), limit) for rows in (order[:cut], order[cut:]))
    test = RaggedSplit(parts["test"]["tokens"], parts["test"]["ends"], parts["test"]["labels"], shift=1, limit=limit)
    labels, test_labels = np.asarray(train.labels), np.asarray(test.labels)
    return Task(
        name="text",
        kind="classifier",
        train=train,
        val=val,
        test=test,
        inputs="tokens",
        vocab=257,
        classes=2,
        max_length=limit,
        baselines={"majority class": majority(labels, test_labels)},
        chance_loss=entropy(labels),
        note="validation is a tenth of the training reviews; published results selected on the test reviews",
    )


def _select(split: RaggedSplit, rows: np.ndarray, limit: int) -> RaggedSplit:
    pieces = [split[int(row)].astype(np.uint8) for row in rows]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return RaggedSplit(np.concatenate(pieces), ends, np.asarray(split.labels)[rows], shift=1, limit=limit)


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
        table = parquet.read_table(source, columns=["text", "label"]).to_pydict()
        for text, label in zip(table["text"], table["label"], strict=True):
            yield text.encode(), label
    else:
        with (
            lzma.open(source, "rt", encoding="utf-8")
            if source.suffix == ".xz"
            else source.open(encoding="utf-8") as file
        ):
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    yield row["text"].encode(), row["label"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{source} line {number} is not an object with text and label") from None


def _pack(reviews: Iterator[tuple[bytes, int]], source: Path) -> Arrays:
    texts, labels = [], []
    try:
        for text, label in reviews:
            if label not in (0, 1):
                raise ValueError(f"{source}: review {len(texts) + 1} has label {label!r}, wanted 0 or 1")
            texts.append(text)
            labels.append(label)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{source} is damaged ({error}): get it again") from None
    if not texts:
        raise ValueError(f"{source} holds no reviews")
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {
        "tokens": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "ends": ends,
        "labels": np.array(labels, dtype=np.uint8),
    }
