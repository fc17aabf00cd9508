"""Does one paper cite the other: pairs of texts for two towers (LRA Retrieval), and citation pairs of one's own.

A paper occurs in many pairs and is kept once, as its first 10,000 bytes (LRA's cut).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.cache import Arrays, prepared
from chela.data.characters import TextEncoding, encode, pack, unpack, vocabulary
from chela.data.find import find_folder, lines, objects, stamp
from chela.data.ragged import PairSplit
from chela.data.task import Task, differs, entropy, majority

Pair = tuple[int, bytes, bytes]
Progress = Callable[[str], None] | None

MAX_LENGTH, KEPT = 4000, 10_000
"""Steps of a paper that are read, and bytes of it that are kept."""
AAN = {part: f"new_aan_pairs.{part}.tsv" for part in ("train", "eval", "test")}
AAN_WANTED = (
    "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv (folder tsv_data of the LRA release, "
    "https://github.com/google-research/long-range-arena)"
)
AAN_TRAIN = 147_086
"""Training pairs of the release."""
PARTS = ("train", "validation", "test")
CITATIONS_WANTED = (
    "docs.jsonl (objects with id and text, also .jsonl.xz) and pairs.tsv (header split, label, citing, cited; splits "
    "train, validation and test), your own papers and the citations between them"
)


def load(config: DataConfig, progress: Progress) -> Task:
    """The published pairs of the ACL Anthology Network: label, two ids, two texts, divided by tabs, no header.

    Raises:
        ValueError: files missing, or a malformed line (names it).
    """
    folder = find_folder(
        config.root,
        ("retrieval", "aan", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data"),
        lambda folder: all((folder / name).is_file() for name in AAN.values()),
        "retrieval",
        AAN_WANTED,
    )
    paths = [folder / name for name in AAN.values()]
    key = {"files": [stamp(path) for path in paths]}
    arrays = prepared(config.root, "retrieval", key, lambda: _pack([_read_aan(path) for path in paths], progress))
    note = "the published pairs of AAN" + differs("training pairs", len(arrays["labels_0"]), AAN_TRAIN)
    return _task("retrieval", arrays, config, key, note)


def load_citations(config: DataConfig, progress: Progress) -> Task:
    """Citation pairs of one's own: every paper once in docs.jsonl, the pairs in pairs.tsv.

    Raises:
        ValueError: files missing, a malformed line (names it), or a paper that is not there.
    """
    names = ("docs.jsonl", "docs.jsonl.xz")
    folder = find_folder(
        config.root,
        ("citations", "acl_citation_pairs"),
        lambda folder: (folder / "pairs.tsv").is_file() and any((folder / name).is_file() for name in names),
        "citations",
        CITATIONS_WANTED,
    )
    texts = next(folder / name for name in names if (folder / name).is_file())
    key = {"files": [stamp(texts), stamp(folder / "pairs.tsv")]}

    def make() -> Arrays:
        found = {name: text.encode(errors="replace") for name, text in objects(texts, {"id": str, "text": str})}
        rows = _read_citations(folder / "pairs.tsv", found)
        return _pack([iter(rows[part]) for part in PARTS], progress)

    arrays = prepared(config.root, "citations", key, make)
    return _task("citations", arrays, config, key, f"citation pairs in {folder.name}; not AAN, not LRA's Retrieval")


def _task(name: str, arrays: Arrays, config: DataConfig, key: dict, note: str) -> Task:
    if config.max_length > KEPT:
        raise ValueError(f"--data.max-length is {config.max_length}: only {KEPT:,} bytes of a paper are kept")
    encoding, packed = TextEncoding(), arrays
    if config.encoding == "characters":
        packed = prepared(config.root, f"{name}-characters", key, lambda: _as_characters(arrays))
        encoding = TextEncoding(packed["vocabulary"])
    documents = encoding.sequences(packed, config.max_length or MAX_LENGTH)
    splits = []
    for part in range(3):
        first, second, labels = (np.asarray(arrays[f"{what}_{part}"]) for what in ("first", "second", "labels"))
        splits.append(PairSplit(documents, first, second, labels))
    train, val, test = splits
    return Task(
        name=name,
        kind="two-tower",
        train=train,
        val=val,
        test=test,
        inputs="tokens",
        vocab=encoding.vocab,
        classes=2,
        names=("no citation", "citation"),
        decode=encoding.decode,
        max_length=config.max_length or MAX_LENGTH,
        baselines={"majority class": majority(train.labels, test.labels)},
        chance_loss=entropy(train.labels),
        note=note,
    )


def _as_characters(arrays: Arrays) -> Arrays:
    """Characters of the training papers, as far as they are read, and every paper in them."""
    trained = np.union1d(arrays["first_0"], arrays["second_0"])
    known = vocabulary((text for i, text in enumerate(unpack(arrays)) if _in(trained, i)), limit=MAX_LENGTH - 1)
    return {"vocabulary": known, **encode(unpack(arrays), known)}


def _in(ordered: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ordered, value))
    return place < len(ordered) and ordered[place] == value


def _pack(parts: list[Iterator[Pair]], progress: Progress) -> Arrays:
    """Every text once, and of each part the pairs as indices: first, second, labels."""
    places: dict[bytes, int] = {}
    arrays: Arrays = {}
    for number, part in enumerate(parts):
        rows = []
        for label, *texts in part:
            rows.append((label, *(places.setdefault(text[:KEPT], len(places)) for text in texts)))
            if progress and len(rows) % 20_000 == 0:
                progress(f"pairs of the {PARTS[number]} split read: {len(rows):,}, {len(places):,} papers")
        if not rows:
            raise ValueError(f"there are no pairs for the {PARTS[number]} split: get the files again")
        labels, first, second = np.array(rows, dtype=np.int32).T
        arrays |= {f"labels_{number}": labels.astype(np.uint8), f"first_{number}": first, f"second_{number}": second}
    return {**arrays, **pack(places)}


def _read_aan(path: Path) -> Iterator[Pair]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != 5:
                raise ValueError(
                    f"{path} line {number} has {len(fields)} fields instead of label, id1, id2, text1, text2: "
                    "the file is cut off or not LRA's, get it again"
                )
            yield _label(fields[0].decode(errors="replace"), path, number), fields[3], fields[4]


def _read_citations(path: Path, texts: dict[str, bytes]) -> dict[str, list[Pair]]:
    rows: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for number, line in lines(path):
        fields = line.split("\t")
        if number == 1 and fields == ["split", "label", "citing", "cited"]:
            continue
        if number == 1 or len(fields) != 4 or fields[0] not in rows:
            raise ValueError(f"{path} line {number} is not split, label, citing and cited, divided by tabs")
        missing = next((name for name in fields[2:] if name not in texts), None)
        if missing is not None:
            raise ValueError(f"{path} line {number}: no paper has the id {missing!r}")
        rows[fields[0]].append((_label(fields[1], path, number), texts[fields[2]], texts[fields[3]]))
    return rows


def _label(field: str, path: Path, number: int) -> int:
    if field not in ("0", "1", "0.0", "1.0"):
        raise ValueError(f"{path} line {number}: the label is {field!r}, wanted 0 or 1")
    return int(field[0])
