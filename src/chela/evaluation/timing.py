"""How long something takes: medians of repeated runs on the clock of the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

MOST = 200
"""Repeats of a measurement, at most; at least three."""


@dataclass(frozen=True)
class Time:
    """Milliseconds of one run: the median and the 20 % and 80 % quantiles of the repeats."""

    median: float
    low: float
    high: float
    repeats: int


def measure(work: Callable[[], object], device: torch.device, seconds: float) -> Time:
    """Time `work` for about `seconds` after a warm-up.

    On a GPU each repeat is timed by events, with its second-level cache cleared in between.
    """
    clock = _on_gpu(device) if device.type == "cuda" else _on_cpu
    work()
    once = clock(work)  # the first run may allocate and compile: it does not count
    repeats = int(min(max(seconds * 1000 / max(clock(work), once / 10, 1e-3), 3), MOST))
    low, median, high = np.quantile([clock(work) for _ in range(repeats)], [0.2, 0.5, 0.8])
    return Time(float(median), float(low), float(high), repeats)


def _on_cpu(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def _on_gpu(device: torch.device) -> Callable[[Callable[[], object]], float]:
    rubbish = torch.empty(2 * _cache_bytes(device), dtype=torch.int8, device=device)

    def clock(work: Callable[[], object]) -> float:
        rubbish.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    return clock


def _cache_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
