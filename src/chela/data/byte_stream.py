"""Any text as a stream of bytes, for language models."""

import lzma
import math
from pathlib import Path

import numpy as np

from chela.config import DataConfig
from chela.data.batch import StreamSplit
from chela.data.cache import prepared
from chela.data.find import find_folder
from chela.data.task import Task

PARTS = ("train", "valid", "test")
MAX_LENGTH = 1024
WANTED = "train.txt, valid.txt and test.txt (any text of yours, UTF-8 or not; also .txt.xz)"


def load(config: DataConfig) -> Task:
    """Windows of `data.max_length` bytes, each predicting the next byte; vocabulary 256.

    Raises:
        ValueError: files missing, damaged or empty.
    """
    folder = find_folder(
        config.root, ("bytes",), lambda folder: all(_path(folder, part) for part in PARTS), "bytes", WANTED
    )
    window = config.max_length or MAX_LENGTH
    train, val, test = (StreamSplit(_stream(config.root, folder, part), window) for part in PARTS)
    return Task(
        name="bytes",
        kind="causal-lm",
        train=train,
        val=val,
        test=test,
        inputs="tokens",
        vocab=256,
        max_length=window,
        chance_loss=math.log(256),
        note=f"the text in {folder.name}",
    )


def _path(folder: Path, part: str) -> Path | None:
    return next((folder / f"{part}{end}" for end in (".txt", ".txt.xz") if (folder / f"{part}{end}").is_file()), None)


def _stream(root: Path, folder: Path, part: str) -> np.ndarray:
    path = _path(folder, part)
    assert path is not None

    def read() -> dict[str, np.ndarray]:
        try:
            content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        except lzma.LZMAError as error:
            raise ValueError(f"{path} is damaged ({error}): get it again") from None
        return {"bytes": np.frombuffer(content, dtype=np.uint8)}

    key = {"path": str(path), "size": path.stat().st_size, "time": path.stat().st_mtime_ns}
    stream = prepared(root, f"bytes-{part}", key, read)["bytes"]
    if len(stream) < 2:
        raise ValueError(f"{path} has {len(stream)} bytes: at least 2 are needed")
    return stream
