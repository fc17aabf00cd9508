"""Pathfinder and Path-X as published: folders of PNG images with plain-text metadata (LRA release).

The hard set, `curv_contour_length_14`, holds imgs/N/sample_K.png and metadata/N.npy, which is text in spite of its
name: a line an image with folder, file, index, label and the settings of the generator.
"""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import pixels
from chela.data.cache import Arrays, prepared, prepared_rows
from chela.data.find import stamp
from chela.data.order import random_split
from chela.data.task import Task, differs, entropy, majority

HARD = "curv_contour_length_14"
PUBLISHED = 200_000
"""Images of the hard set."""
CENTRE = 127.5
"""Gray values 0..255 become real values -1..1 (S5, MEGA)."""
NAMES = {32: "pathfinder", 128: "path-x"}


def find(root: Path, size: int) -> Path | None:
    """The folder of the hard set of `size` x `size` pixels, or None.

    Args:
        root: data root; looked for in it, in `pathfinder` (or `path-x`) and in `lra_release`.
        size: pixels a side.

    Raises:
        ValueError: both of the two folders that the published archive has (at 128 pixels they differ).
    """
    root = root.expanduser()
    folder = f"pathfinder{size}"
    release = [root / "lra_release" / folder, root / "lra_release" / "lra_release" / folder]
    own = [root / folder, root / "pathfinder" / folder, root / NAMES.get(size, folder) / folder]
    found = [place / HARD for place in (*own, *release) if (place / HARD / "metadata").is_dir()]
    if found and found == [place / HARD for place in release]:
        raise ValueError(
            f"the LRA archive holds two folders {folder}, {release[0]} and {release[1]}: "
            f"move the one you mean to {root / folder}"
        )
    return found[0] if found else None


def load(config: DataConfig, size: int, progress: Callable[[str], None] | None = None) -> Task | None:
    """The published images in rows from the top left, split as S4, S5 and MEGA do; None when there are no files.

    Args:
        config: data root, and encoding: "real" for values in -1..1, "tokens" for gray values as symbols.
        size: pixels a side.
        progress: told now and then.

    Raises:
        ValueError: a malformed line, an image that is missing, damaged or of another size (names the file); or pillow
            is not installed.
    """
    folder = find(config.root, size)
    if folder is None:
        return None
    name = NAMES.get(size, f"pathfinder{size}")
    lists = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.name), path.name))
    key = {"lists": [stamp(path) for path in lists]}
    index = prepared(config.root, f"{name}-index", key, lambda: _index(folder, lists))
    paths, labels = index["paths"], np.asarray(index["labels"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def make(start: int, stop: int) -> np.ndarray:
            rows = pool.map(lambda path: _pixels(folder / path, size), paths[start:stop].tolist())
            return np.stack(list(rows))

        raw = prepared_rows(config.root, name, key, (len(labels), size * size), np.uint8, make, progress)
    held = len(labels) // 10
    cuts = [len(labels) - 2 * held, len(labels) - held]
    train, val, test = (
        pixels(part, classes, config.encoding, CENTRE, CENTRE)
        for part, classes in zip(np.split(raw, cuts), np.split(labels, cuts), strict=True)
    )
    tokens = config.encoding == "tokens"
    return Task(
        name=name,
        kind="classifier",
        train=train,
        val=val,
        test=test,
        inputs="tokens" if tokens else "real",
        vocab=256 if tokens else 0,
        channels=0 if tokens else 1,
        classes=2,
        names=("not joined", "joined"),
        max_length=size * size,
        baselines={"majority class": majority(train.labels, test.labels)},
        chance_loss=entropy(train.labels),
        note=f"published images in {folder.parent.name}/{HARD}, split as S4 and MEGA do"
        + differs("images", len(labels), PUBLISHED),
    )


def _index(folder: Path, lists: list[Path]) -> Arrays:
    """Paths and labels of all images: training, then validation, then test."""
    paths, labels = [], []
    for path in lists:
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ValueError(
                    f"{path} line {number} is not folder, file, index, label (0 or 1), ...: unpack the archive again"
                )
            paths.append(f"{fields[0]}/{fields[1]}")
            labels.append(int(fields[3]))
    if len(paths) < 10:
        raise ValueError(f"{folder / 'metadata'} names {len(paths)} images: unpack the archive again")
    held = len(paths) // 10
    order = np.concatenate(random_split(len(paths) - 2 * held, held, held))
    return {"paths": np.array(paths)[order], "labels": np.array(labels, dtype=np.uint8)[order]}


def _pixels(path: Path, size: int) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError(f"{path} needs the package pillow: pip install 'chela[data]'") from None
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            if image.size != (size, size):
                raise ValueError(f"{path} has {image.size[0]} x {image.size[1]} pixels instead of {size} x {size}")
            return np.asarray(image.convert("L")).reshape(-1)
    except FileNotFoundError:
        raise ValueError(f"{path} is in the metadata but not there: unpack the archive again") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a whole image ({error}): unpack the archive again") from None
