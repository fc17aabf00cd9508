"""Several processes as one: torchrun's environment, DDP, sums, and work that rank 0 does for all.

Gradients are averaged by DDP, parameters are equal on all ranks at every step. Batch norm statistics are those of each
process's own slice; the running ones that count are rank 0's. All ranks must see the same file system.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chela.training.device import pick_device

Answer = TypeVar("Answer")
PATIENCE = timedelta(hours=2)  # rank 0 may generate a data set while the others wait


def rank() -> int:
    """This process's number, from torchrun's environment."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """How many processes train together, from torchrun's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


@contextmanager
def world(device: Literal["auto", "cpu", "cuda"]) -> Iterator[torch.device]:
    """Join the processes torchrun started (if it did) and leave them at the end; gives this process's device."""
    place = pick_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size() == 1 or dist.is_initialized():
        yield place
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=place if place.type == "cuda" else None)
    try:
        yield place
    finally:
        gc.collect()  # a DDP model that is still there would keep gloo's threads, which may abort a process that exits
        dist.destroy_process_group()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """Average gradients over all processes; the model itself when there is one."""
    if size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    # gradients as views into DDP's buckets would lie elsewhere after a restart, and sums over them round otherwise
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=False)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers (running statistics)."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in order of rank."""
    if size() == 1:
        return [text]
    raw = text.encode()
    lengths = torch.zeros(size(), dtype=torch.int64)
    lengths[rank()] = len(raw)
    sum_over_ranks(lengths)
    table = torch.zeros(size(), int(lengths.max()) + 1, dtype=torch.uint8)
    table[rank(), : len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
    sum_over_ranks(table)
    return [bytes(row[:n].tolist()).decode() for row, n in zip(table, lengths.tolist(), strict=True)]


class Echo(ValueError):
    """Rank 0's refusal as it reaches another process, which need not say it again."""

    said = True


def on_main(action: Callable[[], str | None]) -> str:
    """Let rank 0 act for all; every rank gets its answer ("" for None), or its ValueError (an `Echo` elsewhere)."""
    answer = failure = ""
    if is_main():
        try:
            answer = action() or ""
        except ValueError as error:
            failure = str(error) or "failed"
    answer, failure = (gather_texts(text)[0] for text in (answer, failure))
    if failure:
        raise ValueError(failure) if is_main() else Echo(failure)
    return answer


def main_first(action: Callable[[], Answer]) -> Answer:
    """Let rank 0 act before the others do the same: it fills caches on disk that they then read."""
    box: list[Answer] = []
    on_main(lambda: box.append(action()))
    return box[0] if box else action()
