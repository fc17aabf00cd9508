"""Files that outlast a crash and a power cut: flushed to disk, written whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import IO


def write_whole(path: Path, content: bytes) -> None:
    """Write aside, flush to disk, rename: a crash leaves the old file or the new one, a full disk the old one alone."""
    aside = path.with_name(path.name + ".tmp")
    try:
        write_synced(aside, content)
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Flush what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def same_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (a hard link, or a copy where the file system has none), in one move."""
    aside = target.with_name(target.name + ".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    aside.replace(target)  # does nothing when both already are one file
    aside.unlink(missing_ok=True)
