"""How the Triton kernels cut their work: the one place that looks at shapes. Tiles are a small fixed table.

A row (a sequence with one head) is walked through by one program for each tile of its values. Where rows and tiles
are too few to fill the GPU, rows are split in time: what each split adds to the state is summed first and scanned, at
the cost of reading two of the inputs once more.
"""

import functools
from dataclasses import dataclass, replace

import torch

from chela.ops.launch import roomy

MAX_KEY = 256
PERIOD = 1024
"""Tokens between saved states where one walk back does it all: 1/16 of an input's memory at K = V = 64."""
HELD, MOST_HELD = 32_768, 512
"""Bytes and rows of a state that a program keeps where every token is multiplied with the same one."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one launch."""

    key_tile: int
    value_tile: int
    """Columns of V in a tile; in the backward pass, in a block."""
    blocks: int
    """Blocks of V that one program of the backward pass keeps; 1 in the others."""
    chunk: int
    warps: int
    stages: int
    splits: int
    unit: int
    """Splits are whole multiples of this many tokens."""

    def programs(self, width: int) -> int:
        """Programs that share a row of values `width` wide."""
        return -(-width // (self.value_tile * self.blocks))


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """Sizes of a backward pass, which the forward pass needs too: where to save states."""

    one_walk: bool
    """All gradients in one walk, without a decay."""
    query_chunk: int
    query_stages: int
    """Of the walk that gives dq, where it is one of its own."""

    @property
    def period(self) -> int:
        """Tokens between saved states: a split's unit, so that every split begins and ends at one."""
        return self.unit

    @property
    def saves(self) -> bool:
        """Whether the forward pass must save states at all."""
        return self.one_walk or self.splits > 1

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


def plans(
    rows: int,
    length: int,
    key: int,
    value: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    decays: bool = False,
) -> tuple[Plan, BackwardPlan]:
    """Sizes of a forward and a backward pass over `rows` sequences and heads of `length` tokens."""
    sizes = rows, length, key, value, dtype, multiprocessors(device), decays, roomy(device)
    if type(rows) is int and type(length) is int:
        return _plans(*sizes)
    return _plans.__wrapped__(*sizes)  # a compiler's symbols, which cannot be looked up


@functools.lru_cache(maxsize=4096)
def _plans(
    rows: int, length: int, key: int, value: int, dtype: torch.dtype, processors: int, decays: bool, room: bool
) -> tuple[Plan, BackwardPlan]:
    plans = (
        _forward_plan(rows, length, key, value, dtype, processors),
        _backward_plan(rows, length, key, value, dtype, processors, decays),
    )
    if room or tile(key, MAX_KEY) <= 128:
        return plans
    forward, backward = plans
    fewer = {"stages": min(backward.stages, 2), "query_stages": min(backward.query_stages, 2)}
    return replace(forward, stages=1), replace(backward, **fewer)


def sums_plan(key: int, value: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Tiles of sums of states, which are all loading; the splits are those of the pass that wants the sums."""
    return _sums_plan(key, value, dtype, roomy(device))


@functools.cache
def _sums_plan(key: int, value: int, dtype: torch.dtype, room: bool) -> Plan:
    key_tile, wide = tile(key, MAX_KEY), dtype == torch.float32
    value_tile = tile(value, 32 if wide or key_tile > 128 else 64)
    stages = 2 if wide else 4
    if not room and key_tile > 128:
        stages //= 2
    return Plan(key_tile, value_tile, 1, 32 if wide else 64, 4, stages, 1, 64)


def product_plan(rows: int, length: int, key: int, width: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Tiles and splits of products of every token with one state [key, width].

    There are splits enough for four programs on every multiprocessor. As many columns of a state are in a tile as can
    be held; of one with more than `MOST_HELD` rows none are.
    """
    sizes = rows, length, key, width, dtype.itemsize, multiprocessors(device), roomy(device)
    if type(rows) is int and type(length) is int:
        return _product_plan(*sizes)
    return _product_plan.__wrapped__(*sizes)  # a compiler's symbols, which cannot be looked up


@functools.lru_cache(maxsize=4096)
def _product_plan(rows: int, length: int, key: int, width: int, size: int, processors: int, room: bool) -> Plan:
    chunk = 64
    column = tile(key, MOST_HELD) * size  # bytes
    value_tile = tile(width, min(128, HELD // column))
    splits = _splits(4 * processors, rows * -(-width // value_tile), length, chunk)
    unit = -(-length // (splits * chunk)) * chunk
    ahead = column <= 256 or (room and key <= MAX_KEY)  # there is room for the next tokens beside the state
    return Plan(tile(key, 64), value_tile, 1, chunk, 4, 2 if ahead else 1, -(-length // unit), unit)


def _forward_plan(rows: int, length: int, key: int, value: int, dtype: torch.dtype, processors: int) -> Plan:
    key_tile, wide = tile(key, MAX_KEY), dtype == torch.float32
    value_tile = tile(value, 32 if wide or key_tile > 128 else 64)
    enough = 0.8 * processors
    if value_tile > 32 and rows * -(-value // value_tile) < enough <= rows * -(-value // 32):
        value_tile = 32  # twice the programs, which costs less than a split
    groups = rows * -(-value // value_tile)
    chunk, unit = (32 if wide else 64), 64
    splits = 1 if groups >= enough else _splits(2 * processors, groups, length, unit)
    stages = 2 if wide or key_tile > 128 or splits > 1 else 4 if value_tile == 32 else 3
    return Plan(key_tile, value_tile, 1, chunk, 4, stages, splits, unit)


def _backward_plan(
    rows: int, length: int, key: int, value: int, dtype: torch.dtype, processors: int, decays: bool
) -> BackwardPlan:
    key_tile, wide = tile(key, MAX_KEY), dtype == torch.float32
    entries = 4096 if wide else 16_384  # of a state in one program: 64 registers for each thread of 8 warps
    widest = 128 if key_tile == 128 and not decays else 64  # what spills least
    value_tile = tile(value, min(widest, entries // key_tile))
    blocks = min(-(-value // value_tile), entries // (key_tile * value_tile), 4)
    kept = key_tile * value_tile * blocks
    one_walk = not decays and not wide and kept <= 4096 and value <= value_tile
    small = kept <= 8192
    resident = 2 * processors if small else processors
    groups = rows * -(-value // (value_tile * blocks))
    if wide:
        chunk, warps, stages = 32, 8, 1
    elif not small:
        chunk, warps, stages = 32, 8, 3
    elif decays:
        chunk, warps, stages = 32, 4, 3
    else:
        chunk, warps, stages = 64, 4, 1 if one_walk else 2
    splits = _splits(resident, groups, length, 64)
    share = -(-length // (splits * 64)) * 64
    period = min(share, PERIOD) if one_walk else share
    return BackwardPlan(
        key_tile, value_tile, blocks, chunk, warps, stages, splits, max(period, 64), one_walk,
        query_chunk=32, query_stages=1 if wide else 3,
    )  # fmt: skip


def _splits(programs: int, groups: int, length: int, unit: int) -> int:
    """Splits of every row that give at most `programs` programs, so that all run at once; none of less than `unit`."""
    return max(1, min(programs // max(groups, 1), -(-length // unit)))
