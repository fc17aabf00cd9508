"""Moments of the output's channels in Triton: each program's share, their merging, and what their gradients add to dy.

A program subtracts the mean of its own rows before it squares; shares are merged as Chan, Golub and LeVeque (1979) do:

    mean = sum_p n_p mean_p / n             n variance = sum_p (squares_p + n_p (mean_p - mean)^2)
"""

import triton
import triton.language as tl


@triton.jit
def counted(mask_ptr, row, n, MASKED: tl.constexpr):
    """Which rows [BM] count."""
    counts = row < n
    if MASKED:
        counts = counts & (tl.load(mask_ptr + row, mask=counts, other=0) != 0)
    return counts


@triton.jit
def add_up(part_ptr, y, counts, D: tl.constexpr, BD: tl.constexpr):
    """Store a program's means, sums of squares around them and number of rows [3, D]; y [BM, BD] float32."""
    d = tl.arange(0, BD)
    number = tl.sum(counts.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(counts[:, None], y, 0.0), axis=0) / tl.maximum(number, 1.0)
    off = tl.where(counts[:, None], y - mean[None, :], 0.0)
    tl.store(part_ptr + d, mean, mask=d < D)
    tl.store(part_ptr + D + d, tl.sum(off * off, axis=0), mask=d < D)
    tl.store(part_ptr + 2 * D + d, tl.zeros([BD], tl.float32) + number, mask=d < D)


@triton.jit(do_not_specialize=["parts"])
def merge(
    moments_ptr,  # [3, D]: mean, variance, number of rows
    parts_ptr,  # [parts, 3, D]
    parts,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS channels, summed over all parts always in the same order."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = tl.zeros([BLOCK, COLUMNS], tl.float32)
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        there = (part < parts)[:, None] & (d < D)[None, :]
        at = parts_ptr + (part.to(tl.int64) * (3 * D))[:, None] + d[None, :]
        number = tl.load(at + 2 * D, mask=there, other=0.0)
        numbers += number
        sums += number * tl.load(at, mask=there, other=0.0)
    number = tl.maximum(tl.sum(numbers, axis=0), 1.0)
    mean = tl.sum(sums, axis=0) / number
    squares = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        there = (part < parts)[:, None] & (d < D)[None, :]
        at = parts_ptr + (part.to(tl.int64) * (3 * D))[:, None] + d[None, :]
        off = tl.load(at, mask=there, other=0.0) - mean[None, :]
        off *= off * tl.load(at + 2 * D, mask=there, other=0.0)
        squares += off + tl.load(at + D, mask=there, other=0.0)
    tl.store(moments_ptr + d, mean, mask=d < D)
    tl.store(moments_ptr + D + d, tl.sum(squares, axis=0) / number, mask=d < D)
    tl.store(moments_ptr + 2 * D + d, number, mask=d < D)


@triton.jit
def of_moments(dmoments_ptr, moments_ptr, y, counts, D: tl.constexpr, BD: tl.constexpr):
    """What the gradients of mean and variance [2, D] add to that of y [BM, BD]."""
    d = tl.arange(0, BD)
    inside = d < D
    share = 1.0 / tl.load(moments_ptr + 2 * D + d, mask=inside, other=1.0)
    mean = tl.load(moments_ptr + d, mask=inside, other=0.0)
    pull = tl.load(dmoments_ptr + D + d, mask=inside, other=0.0) * (2 * share)
    push = tl.load(dmoments_ptr + d, mask=inside, other=0.0) * share - pull * mean
    return tl.where(counts[:, None], push[None, :] + pull[None, :] * y, 0.0)
