"""metrics.jsonl, the record of a run: one JSON object a line, each of a kind.

start: versions, device, parameters. train: means since the line before. val, test: an evaluation. warning: a message.
end: how it ended, with the best validation and the test.
"""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import chela
from chela.disk import write_whole
from chela.training.board import Board

TRACKED = ("ls-files", "--error-unmatch", "__init__.py")
COMMIT = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


class Journal:
    """Appends lines, each flushed at once; without a path it writes nothing (ranks other than 0).

    Args:
        path: the file.
        board: is shown every line, too.
    """

    def __init__(self, path: Path | None, board: Board | None = None) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None
        self._board = board

    def write(self, kind: str, **values: Any) -> None:
        """Add a line; numbers must be finite."""
        if self._file:
            self._file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
            self._file.flush()
        if self._board:
            self._board.write(kind, values)

    def sync(self) -> None:
        """Flush to disk: what a checkpoint relies on must outlast a power cut too."""
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Every line of a journal; a last line that was torn while being written is left out.

    Raises:
        ValueError: no such file, or a line that is no JSON object with a kind.
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or "kind" not in entry:
            what = f"{path}, line {number}, is not a line of a journal: it was edited or damaged"
            raise ValueError(f"{what}; delete the line to go on without it")
        entries.append(entry)
    return entries


def cut(path: Path, step: int) -> None:
    """Drop what a resumed run will write again: lines beyond `step`, tests, and a torn last line."""
    if path.exists():
        kept = [e for e in read(path) if e.get("step", 0) <= step and e["kind"] != "test"]
        write_whole(path, "".join(json.dumps(e) + "\n" for e in kept).encode())


def surroundings(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, device, the commit of a source checkout."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts = {
        "chela": chela.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
    commit = _commit(Path(chela.__file__).parent)
    return facts | {"commit": commit} if commit else facts


def _commit(folder: Path) -> str:
    """The commit of the checkout that holds this package, "-dirty" when changed; "" for an installed package."""
    answer = ""
    for command in (TRACKED, COMMIT):
        try:
            done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answer = done.stdout.strip()
    return answer
