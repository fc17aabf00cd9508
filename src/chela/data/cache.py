"""Prepared arrays on disk: made once, written whole or not at all; the largest go on where they were stopped."""

import hashlib
import io
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from chela.disk import sync, sync_folder

Arrays = dict[str, np.ndarray]
BLOCK_BYTES = 1 << 23
"""About as much of a large array is lost when its preparation is stopped."""
SECONDS = 2.0
"""Between two words on progress."""


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

    def write(aside: Path) -> None:
        for array_name, array in make().items():
            with (aside / f"{array_name}.npy").open("wb") as file:
                np.save(file, array)
                sync(file)

    return _load(prepared_folder(root, name, key, write))


def prepared_folder(root: Path, name: str, key: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """A folder of files that `write` makes, unless they have been made before.

    Args:
        root: data root; the cache is its subfolder `prepared`.
        name: what they are, for the folder's name.
        key: everything they depend on.
        write: fills an empty folder, and flushes what it writes; called when the cache has none.

    Raises:
        ValueError: the cache cannot be written.
    """
    folder = _folder(root, name, key)
    if not folder.is_dir():
        _writable(folder)
        _sweep(folder)
        aside = folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}.tmp")
        try:
            aside.mkdir()
            write(aside)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            ours = isinstance(error, OSError) and str(error.filename or aside).startswith(str(aside))
            if ours:
                raise _no_room(folder, error) from None
            raise
        _publish(aside, folder)
    return folder


def prepared_rows(
    root: Path,
    name: str,
    key: dict[str, Any],
    shape: tuple[int, int],
    dtype: Any,
    make: Callable[[int, int], np.ndarray],
    progress: Callable[[str], None] | None = None,
) -> np.ndarray:
    """One large array of equal rows, made some rows at a time: when stopped, the next call goes on from there.

    Args:
        root: data root; the cache is its subfolder `prepared`.
        name: what the rows are, for the folder's name and for progress.
        key: everything they depend on.
        shape: (rows, width).
        dtype: type of the values.
        make: rows `start` to `stop - 1` as [stop - start, width]; a pure function, so that two processes that make
            the same array at once write the same bytes.
        progress: told now and then.

    Returns:
        The array, memory-mapped read-only.

    Raises:
        ValueError: the cache cannot be written, or its file was damaged since.
    """
    folder = _folder(root, name, {**key, "shape": shape, "dtype": np.dtype(dtype).str})
    if not folder.is_dir():
        _writable(folder)
        aside = folder.with_name(f"{folder.name}.part.tmp")
        there = sum(path.stat().st_size for path in aside.glob("*.npy"))  # of an earlier call
        require_room(root, name, shape[0] * shape[1] * np.dtype(dtype).itemsize - there)
        aside.mkdir(exist_ok=True)
        try:
            _fill(aside / "rows.npy", name, shape, np.dtype(dtype), make, progress)
        except FileNotFoundError:  # another process was quicker and has moved the file to its place
            if not folder.is_dir():
                raise
        _publish(aside, folder)
    return _load(folder)["rows"]


def require_room(root: Path, name: str, size: int) -> None:
    """Refuse to begin what cannot end.

    Args:
        root: data root.
        name: what is to be made.
        size: its bytes, at least.

    Raises:
        ValueError: the disk has less left.
    """
    place = root.expanduser()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise ValueError(
            f"{name} would take {size / 2**30:,.1f} GiB, and {place} has {free / 2**30:,.1f} GiB left: ask for fewer "
            "examples, make room, or name another folder with --data.root"
        )


def _fill(
    path: Path,
    name: str,
    shape: tuple[int, int],
    dtype: np.dtype,
    make: Callable[[int, int], np.ndarray],
    progress: Callable[[str], None] | None,
) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    header = head.getvalue()
    rows, row_bytes = shape[0], shape[1] * dtype.itemsize
    block = max(1, BLOCK_BYTES // row_bytes)
    path.touch()
    _write(path, 0, header)
    # Blocks of an earlier call stay, but for the last whole one: a power cut may have left it its size without its
    # bytes, while those before it were flushed before it was begun.
    whole = (path.stat().st_size - len(header)) // (row_bytes * block)
    first = max(0, whole - 1) * block
    told = time.monotonic()
    for start in range(first, rows, block):
        stop = min(start + block, rows)
        values = np.ascontiguousarray(make(start, stop), dtype=dtype)
        assert values.shape == (stop - start, shape[1])
        _write(path, len(header) + start * row_bytes, values.data)
        if progress and time.monotonic() - told > SECONDS:
            progress(f"{name}: {stop:,} of {rows:,}")
            told = time.monotonic()


def _write(path: Path, offset: int, content: bytes | memoryview) -> None:
    try:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)
            sync(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _no_room(path.parent, error) from None


def _folder(root: Path, name: str, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return root.expanduser() / "prepared" / f"{name}-{digest}"


def _sweep(folder: Path) -> None:
    """Delete what was left when processes of this machine were killed while they prepared the same."""
    for path in folder.parent.glob(f"{folder.name}.*.tmp"):
        *node, pid = path.name.removeprefix(f"{folder.name}.").removesuffix(".tmp").split(".")
        if ".".join(node) == platform.node() and pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Whether another process of this machine has the number; our own was an earlier one's before."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return pid != os.getpid()


def _writable(folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError
    except OSError:
        raise ValueError(
            f"cannot write prepared data to {folder.parent}: name a writable folder with --data.root"
        ) from None


def _no_room(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"cannot write prepared data to {folder.parent} ({error.strerror or error}): make room, "
        "or name another folder with --data.root"
    )


def _publish(aside: Path, folder: Path) -> None:
    try:
        sync_folder(aside)
        aside.rename(folder)
    except OSError:  # another process was quicker with the same arrays
        if not folder.is_dir():
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _load(folder: Path) -> Arrays:
    try:
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    except (ValueError, EOFError) as error:
        raise ValueError(f"prepared data are damaged ({error}): delete {folder} and they are made again") from None
