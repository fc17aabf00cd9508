"""Small made-up files in every published format, and the real ones where they lie beside the checkout."""

import json
import lzma
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chela import data
from chela.config import DataConfig

load_task: Any = data.load_task  # its splits have the fields of their own kind

SHARED = Path(__file__).parents[2] / "shared" / "data"


def load(task, root, **options):
    return load_task(DataConfig(task=task, root=root, **options))


def shared(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {name} beside the checkout")
    return folder


def write_text(root):
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(40)]
    (root / "text").mkdir()
    for name in ("train", "test"):
        (root / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_image(root):
    (root / "image").mkdir()
    labels = np.arange(40, dtype=np.uint8) % 10
    for name in ("train", "test"):
        np.save(root / "image" / f"{name}_images.npy", np.zeros((40, 32, 32), dtype=np.uint8))
    np.savez(root / "image" / "labels.npz", train=labels, test=labels)


def write_bytes(root):
    (root / "bytes").mkdir()
    for name in ("train", "valid", "test"):
        (root / "bytes" / f"{name}.txt").write_text("a line of text\n" * 100)


def write_documents(root, documents=40):
    (root / "bytes").mkdir()
    for part in ("train", "valid", "test"):
        rows = [
            {"text": f"The {part} document {n} says that the best of times was {n * n}.\n"} for n in range(documents)
        ]
        (root / "bytes" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pg19(root, books=2):
    for name in ("train", "validation", "test"):
        (root / "pg19" / name).mkdir(parents=True)
        for number in range(books):
            (root / "pg19" / name / f"{number}.txt").write_text(f"Book {number} of {name}.\r\n")


PAPERS = {"A": "first ä paper", "B": "second paper", "C": "third", "D": "x" * 12_000}
PAIRS = [(1, "A", "B"), (0, "B", "C"), (1, "D", "A"), (0, "C", "C")]


def write_retrieval(root):
    folder = root / "tsv_data"
    folder.mkdir()
    for part in ("train", "eval", "test"):
        lines = (f"{label}.0\t{a}\t{b}\t{PAPERS[a]}\t{PAPERS[b]}\n" for label, a, b in PAIRS)
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(lines), encoding="utf-8")
    return folder


def write_citations(root):
    folder = root / "citations"
    folder.mkdir()
    with lzma.open(folder / "docs.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": name, "text": text}) + "\n" for name, text in PAPERS.items())
    rows = [f"{part}\t{label}\t{a}\t{b}\n" for part in ("train", "validation", "test") for label, a, b in PAIRS]
    (folder / "pairs.tsv").write_text("split\tlabel\tciting\tcited\n" + "".join(rows))
    return folder


def write_pathfinder(root, size, per_list=12, lists=2):
    """Image k of list n is filled with the gray value 16 n + k; the label is k % 2."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    folder = root / f"pathfinder{size}" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for n in range(lists):
        (folder / "imgs" / str(n)).mkdir(parents=True)
        lines = []
        for k in range(per_list):
            gray = np.full((size, size), 16 * n + k, dtype=np.uint8)
            gray[0, 1] = 255
            image.fromarray(gray).save(folder / "imgs" / str(n) / f"sample_{k}.png")
            lines.append(f"imgs/{n} sample_{k}.png {k} {k % 2} 1.0 14 4 2 0.5 1 1\n")
        (folder / "metadata" / f"{n}.npy").write_text("".join(lines))
    return folder


def write_wav(path, samples, rate):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())


def speech_samples(word, number, samples=16_000):
    return np.random.default_rng([*word.encode(), number]).integers(-3000, 3000, samples, dtype=np.int16)


def write_speech(root, words, short=()):
    """Five clips a word: 0 on the testing list, 1 on the validation list; those in `short` end early."""
    folder = root / "speech_commands_v0.02"
    for word in words:
        for number in range(5):
            length = 9000 if number in short else 16_000
            write_wav(folder / word / f"ab{number}_nohash_0.wav", speech_samples(word, number, length), 16_000)
    for list_name, number in (("testing_list.txt", 0), ("validation_list.txt", 1)):
        (folder / list_name).write_text("".join(f"{word}/ab{number}_nohash_0.wav\n" for word in words))
    return folder


def write_spoken_digits(root):
    folder = root / "fsdd"
    for digit in range(10):
        for index in range(12):
            samples = speech_samples(f"digit{digit}", index, 200 + 10 * digit + index)
            write_wav(folder / "recordings" / f"{digit}_ann_{index}.wav", samples, 8000)
    return folder
