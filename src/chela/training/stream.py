"""The training examples of each step, cut for this process and read one step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from chela.config import RunConfig
from chela.data import Batch, Task, consecutive_at, indices_at
from chela.data.buckets import Buckets
from chela.training import distributed
from chela.training.metrics import IGNORED, check_labels, check_tokens, targets
from chela.training.warmup import cut, pieces_at


@dataclass(frozen=True)
class Share:
    """What one process computes of one step."""

    parts: list[Batch]
    """Slices whose gradients are added up, on the CPU."""
    targets: int
    """Labels that count, in all parts."""
    tokens: int
    """Positions that are not padding, in all parts."""


class Source:
    """Which examples each step takes, and this process's share of them: pure functions of seed, step, rank and size."""

    def __init__(self, task: Task, run: RunConfig) -> None:
        self._task, self._run = task, run
        lengths = getattr(task.train, "lengths", None)
        pool = run.train.bucket_batches if lengths is not None else 0
        self._buckets = Buckets(lengths(), run.train.batch_size, run.seed, pool) if lengths and pool else None

    def share(self, step: int) -> Share:
        """Read this process's share of a step's batch.

        The global batch is cut into as many runs of equal length as there are processes, each of those into
        `train.accumulate` parts.

        Raises:
            ValueError: a token or label out of range.
        """
        run = self._run
        indices, fresh = self._indices(step)
        mine = indices.reshape(distributed.size(), run.train.accumulate, -1)[distributed.rank()]
        parts = [self._task.train.batch(part) for part in mine]
        if fresh is not None:
            rows = torch.from_numpy(fresh).view(mine.shape)
            parts = [replace(part, fresh=new) for part, new in zip(parts, rows, strict=True)]
        if run.train.length_warmup:
            parts = [cut(part, pieces_at(run.train, part.inputs.shape[1], step)) for part in parts]
        for part in parts:
            check_tokens(part, run.model.vocab)
            check_labels(part, run.model.vocab if run.model.kind == "causal-lm" else run.model.classes)
        count, tokens = sum(map(targets, parts)), sum(map(_tokens, parts))
        longest = run.model.kernel_length if run.model.kind != "causal-lm" else 0
        return Share([pad(part, run.train.pad_multiple, longest) for part in parts], count, tokens)

    def _indices(self, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The examples of a step's global batch and, where states are carried, which rows begin anew."""
        order = len(self._task.train), self._run.train.batch_size, step, self._run.seed
        if self._run.train.carry_state:
            return consecutive_at(*order)
        return indices_at(*order) if self._buckets is None else self._buckets.at(step), None


class Stream:
    """A source's shares, one step ahead in a thread of its own; page-locked memory when it goes to a GPU."""

    def __init__(self, source: Source, steps: float, device: torch.device) -> None:
        def read(step: int) -> Share:
            share = source.share(step)
            return replace(share, parts=[_pin(part) for part in share.parts]) if device.type == "cuda" else share

        self._read: Callable[[int], Share] = read
        self._steps = steps
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


def pad(batch: Batch, multiple: int, longest: int) -> Batch:
    """Pad sequences on the right to a multiple of `multiple` steps (at most `longest`, unless it is 0), with masks.

    Few different lengths mean few CUDA graphs. `multiple` 1 changes nothing. Labels of positions are padded, too.
    Packed rows are full as they are.
    """
    if multiple == 1 or batch.cu_seqlens is not None:
        return batch
    inputs, mask = _pad_side(batch.inputs, batch.mask, multiple, longest)
    labels = batch.labels
    if labels.ndim == 2:
        labels = F.pad(labels, (0, inputs.shape[1] - labels.shape[1]), value=IGNORED)
    padded = replace(batch, inputs=inputs, mask=mask, labels=labels)
    if batch.second is not None:
        second, second_mask = _pad_side(batch.second, batch.second_mask, multiple, longest)
        padded = replace(padded, second=second, second_mask=second_mask)
    return padded


def _pad_side(x: Tensor, mask: Tensor | None, multiple: int, longest: int) -> tuple[Tensor, Tensor]:
    length = -(-x.shape[1] // multiple) * multiple
    more = max(0, (min(length, longest) if longest else length) - x.shape[1])
    mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return F.pad(x, (0, 0, 0, more) if x.ndim == 3 else (0, more)), F.pad(mask, (0, more))


def _tokens(batch: Batch) -> int:
    sides = ((batch.inputs, batch.mask), (batch.second, batch.second_mask))
    return sum(int(mask.sum()) if mask is not None else x.shape[0] * x.shape[1] for x, mask in sides if x is not None)


def _pin(batch: Batch) -> Batch:
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)})
