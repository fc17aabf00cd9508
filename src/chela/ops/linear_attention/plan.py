"""How the Triton kernels cut their work: the one place that looks at shapes. Tiles are a small fixed table.

A row (a sequence with one head) is walked through by one program for each tile of its values. Where rows and tiles
are too few to fill the GPU, rows are split in time: the states that the splits add are summed first and scanned, at
the cost of reading two of the inputs once more.
"""

import functools
from dataclasses import dataclass

import torch

MAX_KEY = 256
STATE_TILE = 16_384
"""Entries of a state that one program keeps: 64 registers for each thread of 8 warps."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch."""

    key_tile: int
    value_tile: int
    chunk: int
    splits: int
    period: int
    warps: int
    stages: int

    def tiles(self, width: int) -> int:
        """Programs that share a row of values `width` wide."""
        return -(-width // self.value_tile)

    def slots(self, length: int) -> int:
        """States saved for a row of `length` tokens."""
        return -(-length // self.period)


def tile(width: int, largest: int) -> int:
    """The smallest power of two that holds `width`, from 16, which matrix units need, to `largest`."""
    return min(max(16, 1 << (width - 1).bit_length()), largest)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run side by side; on a CPU, where kernels are interpreted, one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_plan(rows: int, length: int, key: int, value: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Sizes of a forward pass over `rows` sequences and heads of `length` tokens."""
    return _plan(rows, length, key, value, dtype, multiprocessors(device), largest=128)


def backward_plan(rows: int, length: int, key: int, value: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Sizes of a backward pass; its value tile is as wide as registers allow, as dq and dk sum over all values."""
    return _plan(rows, length, key, value, dtype, multiprocessors(device), largest=256)


def _plan(rows: int, length: int, key: int, value: int, dtype: torch.dtype, programs: int, largest: int) -> Plan:
    key_tile = tile(key, MAX_KEY)
    value_tile = tile(value, min(largest, STATE_TILE // key_tile))
    wide = dtype == torch.float32 or key_tile > 128
    chunk = 32 if wide else 64
    period = 256
    groups = rows * -(-value // value_tile)
    splits = min(-(-2 * programs // groups), -(-length // period)) if groups < programs else 1
    warps = 4 if key_tile * value_tile <= 4096 else 8
    return Plan(key_tile, value_tile, chunk, max(splits, 1), period, warps, 1 if wide else 2)
