"""CIFAR-10 read pixel by pixel: in gray (LRA Image), as real values or tokens, and in colour (sCIFAR)."""

from pathlib import Path
from typing import Any

import numpy as np

from chela.config import DataConfig
from chela.data.batch import FixedSplit, pixels
from chela.data.cache import Arrays, prepared
from chela.data.find import archive, array, find_folder, stamp
from chela.data.order import random_split
from chela.data.task import Task, differs, entropy, majority

TRAIN, TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"
RECORD, PER_FILE = 1 + 3 * 1024, 10_000
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHIFT, SCALE = 122.6, 61.0
"""Mean and deviation of a gray pixel, as S4 takes them."""
MEANS = (125.30691805, 122.95039414, 113.86538318)
DEVIATIONS = (62.99321928, 62.08870764, 66.70489964)
"""Of red, green and blue over the training pixels."""
GRAY_SUM = 6_278_124_545
"""Sum of the gray training pixels."""
FOLDERS = ("image", "cifar-10-batches-bin", "cifar10", "cifar10_gray")
BINARY = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (the 'binary version' on "
    "https://www.cs.toronto.edu/~kriz/cifar.html; the python version holds code that would have to be run)"
)
ARRAYS = "train_images.npy, test_images.npy (uint8 [N, 32, 32], also .npy.xz) and labels.npz (train, test)"
SPLIT = "validation is a tenth of the training images, as S4 and MEGA draw it"


def load(config: DataConfig) -> Task:
    """1,024 gray pixels in rows from the top left, as real values or as tokens of a vocabulary of 256.

    Raises:
        ValueError: files missing, truncated, or with labels out of range.
    """
    folder = find_folder(config.root, FOLDERS, _complete, "image", f"{BINARY}, or {ARRAYS}")
    read = _read_binary if _binary(folder) else _read_numpy
    arrays = prepared(config.root, "image", {"files": _stamps(folder), "form": 2}, lambda: read(folder))
    if arrays["train_images"].shape[1:] != (1024,) or arrays["test_images"].shape[1:] != (1024,):
        raise ValueError(f"{folder} does not hold CIFAR-10: training images {arrays['train_images'].shape}")
    parts = [pixels(raw, labels, config.encoding, SHIFT, SCALE) for raw, labels in _parts(folder, arrays)]
    found = int(arrays["train_images"].sum(dtype=np.int64))
    note = f"CIFAR-10 in gray from {folder.name}; {SPLIT}" + differs("as sum of the training pixels", found, GRAY_SUM)
    lossy = int(arrays["lossy"][0]) if "lossy" in arrays else 0
    note += f"; {lossy:,} test images are decoded JPEG" if lossy else ""
    if config.encoding == "tokens":
        return _task("image", note, parts, inputs="tokens", vocab=256)
    return _task("image", note, parts, inputs="real", channels=1)


def load_colour(config: DataConfig) -> Task:
    """1,024 steps of red, green and blue (sCIFAR), each channel standardised by its own mean and deviation.

    Raises:
        ValueError: files missing, truncated, or with labels out of range.
    """
    folder = find_folder(config.root, FOLDERS, _binary, "image-colour", BINARY)
    key = {"files": _stamps(folder)}
    arrays = prepared(config.root, "image-colour", key, lambda: _read_binary(folder, colour=True))
    parts = [FixedSplit(raw, labels, MEANS, DEVIATIONS) for raw, labels in _parts(folder, arrays)]
    means = arrays["train_images"].mean(axis=(0, 1), dtype=np.float64)
    unlike = "" if np.allclose(means, MEANS, rtol=0, atol=1e-6) else "; the channels' means are not those of CIFAR-10"
    note = f"CIFAR-10 in colour from {folder.name}; {SPLIT}{unlike}"
    return _task("image-colour", note, parts, inputs="real", channels=3)


def gray(rgb: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601 in integers, as Pillow's convert("L"): uint8 [..., 3, P] to uint8 [..., P]."""
    red, green, blue = (rgb[..., channel, :].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def _task(name: str, note: str, parts: list[Any], **inputs: Any) -> Task:
    train, val, test = parts
    return Task(
        name=name,
        kind="classifier",
        train=train,
        val=val,
        test=test,
        classes=10,
        names=NAMES,
        max_length=1024,
        baselines={"majority class": majority(train.labels, test.labels)},
        chance_loss=entropy(train.labels),
        note=note,
        **inputs,
    )


def _parts(folder: Path, arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of training, validation and test."""
    for name in ("train", "test"):
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if len(images) != len(labels) or labels.max() > 9:
            raise ValueError(f"{folder} does not hold CIFAR-10: {name} images {images.shape}, labels {labels.shape}")
    images, labels = arrays["train_images"], np.asarray(arrays["train_labels"])
    held = len(labels) // 10
    train, val = map(np.sort, random_split(len(labels) - held, held))
    test = (arrays["test_images"], np.asarray(arrays["test_labels"]))
    return [(images[train], labels[train]), (images[val], labels[val]), test]


def _binary(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*TRAIN, TEST))


def _complete(folder: Path) -> bool:
    arrays = (_array_path(folder, part) for part in ("train", "test"))
    return _binary(folder) or ((folder / "labels.npz").is_file() and all(path is not None for path in arrays))


def _stamps(folder: Path) -> list[Any]:
    return [stamp(path) for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".npy", ".npz", ".xz")]


def _array_path(folder: Path, part: str) -> Path | None:
    candidates = (folder / f"{part}_images.npy", folder / f"{part}_images.npy.xz")
    return next((path for path in candidates if path.is_file()), None)


def _read_binary(folder: Path, *, colour: bool = False) -> Arrays:
    """The published files: records of a label and 1,024 red, green and blue values."""

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        path = folder / name
        raw = np.fromfile(path, dtype=np.uint8)
        if len(raw) != RECORD * PER_FILE:
            raise ValueError(f"{path} has {len(raw):,} bytes instead of {RECORD * PER_FILE:,}: download it again")
        records = raw.reshape(PER_FILE, RECORD)
        planes = records[:, 1:].reshape(PER_FILE, 3, 1024)
        return planes.transpose(0, 2, 1) if colour else gray(planes), records[:, 0]

    batches = [read(name) for name in TRAIN]
    test_images, test_labels = read(TEST)
    return {
        "train_images": np.concatenate([images for images, _ in batches]),
        "train_labels": np.concatenate([labels for _, labels in batches]),
        "test_images": np.ascontiguousarray(test_images),
        "test_labels": test_labels,
    }


def _read_numpy(folder: Path) -> Arrays:
    arrays: Arrays = {}
    labels = archive(folder / "labels.npz", "train test")
    for part in ("train", "test"):
        path = _array_path(folder, part)
        assert path is not None
        images = array(path)
        arrays[f"{part}_images"] = images.reshape(len(images), -1)
        arrays[f"{part}_labels"] = labels[part].astype(np.uint8)
    lossless = labels.get("test_is_lossless", np.ones(1, dtype=bool))
    return {**arrays, "lossy": np.array([np.count_nonzero(~lossless)])}
