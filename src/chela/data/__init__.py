"""Tasks: what is read from disk or generated, and batches of it as pure functions of (seed, step)."""

from collections.abc import Callable

from chela.config import DataConfig
from chela.data import byte_stream, digits, images, listops, text
from chela.data.batch import Batch as Batch
from chela.data.batch import FixedSplit as FixedSplit
from chela.data.batch import RaggedSplit as RaggedSplit
from chela.data.batch import Split as Split
from chela.data.batch import StreamSplit as StreamSplit
from chela.data.order import indices_at as indices_at
from chela.data.task import Task as Task
from chela.record import nearest

TASKS = {
    "digits": "1,797 handwritten digits of 8 x 8 pixels, read pixel by pixel (comes with chela)",
    "listops": "nested list operations, 501 to 1999 symbols (generated, or the published files)",
    "text": "IMDB reviews as bytes (your copy)",
    "image": "CIFAR-10 in gray, read pixel by pixel (your copy)",
    "bytes": "language modelling on the bytes of any text (your files)",
    "pathfinder": "32 x 32 images of dashed paths (no reader yet)",
    "path-x": "128 x 128 images of dashed paths (no reader yet)",
    "retrieval": "pairs of documents (no reader yet)",
    "speech": "spoken words as raw samples (no reader yet)",
}
"""What each task is, in a line."""


def load_task(config: DataConfig, *, progress: Callable[[str], None] | None = None) -> Task:
    """Read or generate the task `config.task`.

    Args:
        config: task, data root and limits.
        progress: told what takes long.

    Raises:
        ValueError: unknown task, a task without a reader, or data that are missing or malformed; says what to do.
    """
    name = config.task
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{nearest(name, TASKS)}; tasks: {', '.join(TASKS)}")
    if name == "digits":
        return digits.load(config)
    if name == "listops":
        return listops.load(config, progress)
    if name == "text":
        return text.load(config, progress)
    if name == "image":
        return images.load(config)
    if name == "bytes":
        return byte_stream.load(config)
    raise ValueError(f"chela has no reader for {name} yet: it comes with a later version")
