"""CIFAR-10 in gray, read pixel by pixel (LRA Image)."""

import lzma
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import FixedSplit
from chela.data.cache import Arrays, prepared
from chela.data.find import find_folder
from chela.data.task import Task, entropy, majority

BINARY = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
RECORD, PER_FILE = 1 + 3 * 1024, 10_000
SHIFT, SCALE = 122.6, 61.0
"""Mean and deviation of a gray pixel, as S4 takes them."""
WANTED = (
    "data_batch_1.bin to data_batch_5.bin and test_batch.bin (the 'binary version' on "
    "https://www.cs.toronto.edu/~kriz/cifar.html; the python version holds code that would have to be run), "
    "or train_images.npy, test_images.npy (uint8 [N, 32, 32], also .npy.xz) and labels.npz (train, test)"
)


def load(config: DataConfig) -> Task:
    """1,024 real values in rows from the top left; 45,000 / 5,000 of the training images by a permutation of seed 42.

    Raises:
        ValueError: files missing, truncated, or with labels out of range.
    """
    folder = find_folder(
        config.root, ("image", "cifar-10-batches-bin", "cifar10", "cifar10_gray"), _complete, "image", WANTED
    )
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".npy", ".npz", ".xz"))
    key = {path.name: path.stat().st_size for path in paths}
    read = _read_binary if (folder / "test_batch.bin").is_file() else _read_numpy
    arrays = prepared(config.root, "image", {"folder": str(folder), **key}, lambda: read(folder))
    for name in ("train", "test"):
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if len(images) != len(labels) or images.shape[1:] != (1024,) or labels.max() > 9:
            raise ValueError(f"{folder} does not hold CIFAR-10: {name} images {images.shape}, labels {labels.shape}")
    images, labels = arrays["train_images"], np.asarray(arrays["train_labels"])
    order = np.random.default_rng(42).permutation(len(labels))
    cut = len(labels) - len(labels) // 10
    train, val = np.sort(order[:cut]), np.sort(order[cut:])
    test_labels = np.asarray(arrays["test_labels"])
    return Task(
        name="image",
        kind="classifier",
        train=FixedSplit(images[train], labels[train], SHIFT, SCALE),
        val=FixedSplit(images[val], labels[val], SHIFT, SCALE),
        test=FixedSplit(arrays["test_images"], test_labels, SHIFT, SCALE),
        inputs="real",
        channels=1,
        classes=10,
        max_length=1024,
        baselines={"majority class": majority(labels[train], test_labels)},
        chance_loss=entropy(labels[train]),
        note=f"CIFAR-10 in gray from {folder.name}; validation is a tenth of the training images",
    )


def gray(rgb: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601 in integers, as Pillow's convert("L"): uint8 [..., 3, P] to uint8 [..., P]."""
    red, green, blue = (rgb[..., channel, :].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)


def _complete(folder: Path) -> bool:
    if all((folder / name).is_file() for name in (*BINARY, "test_batch.bin")):
        return True
    arrays = (_array_path(folder, part) for part in ("train", "test"))
    return (folder / "labels.npz").is_file() and all(path is not None for path in arrays)


def _array_path(folder: Path, part: str) -> Path | None:
    candidates = (folder / f"{part}_images.npy", folder / f"{part}_images.npy.xz")
    return next((path for path in candidates if path.is_file()), None)


def _read_binary(folder: Path) -> Arrays:
    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        path = folder / name
        raw = np.fromfile(path, dtype=np.uint8)
        if len(raw) != RECORD * PER_FILE:
            raise ValueError(f"{path} has {len(raw):,} bytes instead of {RECORD * PER_FILE:,}: download it again")
        records = raw.reshape(PER_FILE, RECORD)
        return gray(records[:, 1:].reshape(PER_FILE, 3, 1024)), records[:, 0]

    batches = [read(name) for name in BINARY]
    test_images, test_labels = read("test_batch.bin")
    return {
        "train_images": np.concatenate([images for images, _ in batches]),
        "train_labels": np.concatenate([labels for _, labels in batches]),
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _read_numpy(folder: Path) -> Arrays:
    arrays: Arrays = {}
    with np.load(folder / "labels.npz") as labels:
        for part in ("train", "test"):
            path = _array_path(folder, part)
            assert path is not None
            try:
                with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
                    images = np.load(file)
            except (EOFError, ValueError, lzma.LZMAError) as error:
                raise ValueError(f"{path} is damaged ({error}): get it again") from None
            arrays[f"{part}_images"] = images.reshape(len(images), -1)
            arrays[f"{part}_labels"] = labels[part].astype(np.uint8)
    return arrays
