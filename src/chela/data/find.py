"""Where a user's files lie, and how the common forms are read."""

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


def find_folder(root: Path, names: tuple[str, ...], complete: Callable[[Path], bool], task: str, wanted: str) -> Path:
    """The first of `root/name` and `root` itself that holds a task's files.

    Args:
        root: data root; `~` is expanded.
        names: subfolders tried, in order.
        complete: whether a folder holds the files.
        task: name of the task.
        wanted: the files and where users get them.

    Raises:
        ValueError: none does; says which files are wanted, where they are to be had and where to put them.
    """
    root = root.expanduser()
    for folder in (*(root / name for name in names), root):
        if folder.is_dir() and complete(folder):
            return folder
    raise ValueError(
        f"no data for {task}: put {wanted} into {root / names[0]}, or name the folder that has them with --data.root"
    )


def stamp(path: Path) -> list[Any]:
    """What the cache knows a file by: path, size and time of change."""
    found = path.stat()
    return [str(path), found.st_size, found.st_mtime_ns]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a UTF-8 file, plain or .xz.

    Raises:
        ValueError: the file is cut off, damaged or not UTF-8.
    """
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from ((number, line.rstrip("\r\n")) for number, line in enumerate(file, 1))
    except (EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None


def array(path: Path) -> np.ndarray:
    """The array of a .npy or .npy.xz file.

    Raises:
        ValueError: the file is cut off or damaged.
    """
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
            values = np.load(file)
            file.read(1)  # an .xz file's checksum stands at its end
            return values
    except (EOFError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None


def archive(path: Path, names: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Args:
        path: the file.
        names: arrays that it must have, divided by blanks.

    Raises:
        ValueError: the file is damaged, or lacks one of them.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from None
    missing = next((name for name in names.split() if name not in arrays), None)
    if missing is not None:
        raise ValueError(f"{path} has no array {missing!r}, only {', '.join(arrays)}")
    return arrays


def objects(path: Path, fields: dict[str, type]) -> Iterator[tuple[Any, ...]]:
    """The named fields of every JSON object of a file, one object a line.

    Args:
        path: .jsonl or .jsonl.xz.
        fields: their names and types.

    Raises:
        ValueError: a damaged file, or a line that is no object with these fields (names it).
    """
    for number, line in lines(path):
        try:
            row = json.loads(line)
            values = tuple(row[name] for name in fields)
        except (ValueError, KeyError, TypeError):
            values = ()
        if not values or not all(map(isinstance, values, fields.values())):
            raise ValueError(f"{path} line {number} is not an object with {' and '.join(fields)}")
        yield values
