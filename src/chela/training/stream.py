"""The training examples of each step, cut for this process and read one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from chela.config import RunConfig
from chela.data import Batch, Task, indices_at
from chela.training import distributed
from chela.training.metrics import check_labels, check_tokens, targets


@dataclass(frozen=True)
class Share:
    """What one process computes of one step."""

    parts: list[Batch]
    """Slices whose gradients are added up, on the CPU."""
    targets: int
    """Labels that count, in all parts."""
    tokens: int
    """Positions that are not padding, in all parts."""


def take_share(task: Task, run: RunConfig, step: int) -> Share:
    """Read this process's share of a step's batch: a pure function of seed, step, rank and world size.

    The global batch is cut into as many runs of equal length as there are processes, each of those into
    `train.accumulate` parts.

    Raises:
        ValueError: a token or label out of range.
    """
    indices = indices_at(len(task.train), run.train.batch_size, step, run.seed)
    mine = indices.reshape(distributed.size(), run.train.accumulate, -1)[distributed.rank()]
    parts = [task.train.batch(part) for part in mine]
    for part in parts:
        check_tokens(part, run.model.vocab)
        check_labels(part, run.model.vocab if run.model.kind == "causal-lm" else run.model.classes)
    return Share(parts, sum(map(targets, parts)), sum(map(_tokens, parts)))


class Stream:
    """`take_share`, one step ahead in a thread of its own; page-locked memory when it goes to a GPU."""

    def __init__(self, task: Task, run: RunConfig, device: torch.device) -> None:
        def read(step: int) -> Share:
            share = take_share(task, run, step)
            return replace(share, parts=[_pin(part) for part in share.parts]) if device.type == "cuda" else share

        self._read: Callable[[int], Share] = read
        self._steps = run.train.steps
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="chela-data")
        self._ahead: tuple[int, Future[Share]] | None = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, step: int) -> Share:
        """The share of a step; starts reading the next."""
        ready = self._ahead[1] if self._ahead and self._ahead[0] == step else self._pool.submit(self._read, step)
        share = ready.result()
        if step + 1 < self._steps:
            self._ahead = step + 1, self._pool.submit(self._read, step + 1)
        return share


def _tokens(batch: Batch) -> int:
    sides = ((batch.inputs, batch.mask), (batch.second, batch.second_mask))
    return sum(int(mask.sum()) if mask is not None else x.shape[0] * x.shape[1] for x, mask in sides if x is not None)


def _pin(batch: Batch) -> Batch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)})
