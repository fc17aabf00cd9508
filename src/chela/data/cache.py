"""Prepared arrays on disk: made once, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def prepared(root: Path, name: str, key: dict[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Arrays that `make` gives, from the cache when they have been made before.

    Args:
        root: data root; the cache is its subfolder `prepared`.
        name: what they are, for the folder's name.
        key: everything they depend on.
        make: makes them; called when the cache has none.

    Returns:
        The arrays, memory-mapped read-only.

    Raises:
        ValueError: the cache cannot be written, or its files were damaged since.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = root.expanduser() / "prepared" / f"{name}-{digest}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(folder.parent, os.W_OK):
                raise PermissionError
        except OSError:
            raise ValueError(
                f"cannot write prepared data to {folder.parent}: name a writable folder with --data.root"
            ) from None
        _write(folder, make())
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    except (ValueError, EOFError) as error:
        raise ValueError(f"prepared data are damaged ({error}): delete {folder} and they are made again") from None


def _write(folder: Path, arrays: Arrays) -> None:
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    aside.mkdir()
    for name, array in arrays.items():
        with (aside / f"{name}.npy").open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    try:
        aside.rename(folder)
    except OSError:  # another process was quicker with the same arrays
        if not folder.is_dir():
            raise
        shutil.rmtree(aside)
