"""How long something takes: medians of repeated runs on the clock of the device, and how fast the device copies."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

MOST = 200
"""Repeats of a measurement, at most; at least three."""
MIB = 2**20


@dataclass(frozen=True)
class Time:
    """Milliseconds of one run: the median and the 20 % and 80 % quantiles of the repeats."""

    median: float
    low: float
    high: float
    repeats: int

    def shared(self, steps: int) -> "Time":
        """The mean of that many steps that one run took."""
        return Time(self.median / steps, self.low / steps, self.high / steps, self.repeats)


def measure(work: Callable[[], object], device: torch.device, seconds: float) -> Time:
    """Time `work` for about `seconds` after a warm-up.

    On a GPU each repeat is timed by events and begins with a cold second-level cache. The work is queued behind a fill
    of memory that takes longer than the queueing, so that the time is the device's own: what Python spends on
    launching is hidden, whoever is timed.
    """
    work()  # the first run may allocate and compile: it does not count
    clock = _on_gpu(work, device) if device.type == "cuda" else _on_cpu(work)
    once = clock()
    repeats = int(min(max(seconds * 1000 / max(clock(), once / 10, 1e-3), 3), MOST))
    low, median, high = np.quantile([clock() for _ in range(repeats)], [0.2, 0.5, 0.8])
    return Time(float(median), float(low), float(high), repeats)


def copy_speed(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes a second, read and written ones added, of a plain copy too large for the caches."""
    source = torch.zeros((512 if device.type == "cuda" else 64) * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: target.copy_(source), device, seconds).median / 1000)


def _on_cpu(work: Callable[[], object]) -> Callable[[], float]:
    def clock() -> float:
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)

    return clock


def _on_gpu(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    rubbish = torch.empty(max(2 * _cache_bytes(device), 256 * MIB), dtype=torch.int8, device=device)

    def elapsed(run: Callable[[], object], fills: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(fills):
            rubbish.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    def queueing() -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - started)

    elapsed(rubbish.zero_, 1)
    fill = min(elapsed(rubbish.zero_, 1) for _ in range(3))
    fills = 1 + math.ceil(1.5 * min(queueing() for _ in range(3)) / fill)
    return lambda: elapsed(work, min(fills, 100))


def _cache_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * MIB
