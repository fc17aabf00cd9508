"""Moments of channels in Triton: each program's share, their merging, and what their gradients add to that of the rows.

A thread adds one row after the other, as Welford (1962) does, so that squares are of differences alone; threads and
programs are merged as Chan, Golub and LeVeque (1979) do:

    mean = sum_p n_p mean_p / n             n variance = sum_p (squares_p + n_p (mean_p - mean)^2)

A mean of numbers far from zero loses digits that their spread needs, so the mean of what is left is added to it.
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
def take_in(number, mean, squares, y, counts):
    """Moments of each lane [BM] or [BM, BD] with one more row for each: y [BM, BD] float32 where it counts [BM]."""
    number += counts.to(tl.float32)
    share = (1.0 / tl.maximum(number, 1.0))[:, None]
    off = tl.where(counts[:, None], y - mean, 0.0)
    return number, mean + off * share, squares + off * off * (1 - share)


@triton.jit
def store_part(part_ptr, number, mean, squares, D: tl.constexpr, BD: tl.constexpr):
    """Merge a program's lanes and store its means, sums of squares around them and number of rows [3, D]."""
    d = tl.arange(0, BD)
    rows = tl.sum(number, axis=0)
    count = tl.maximum(rows, 1.0)
    middle = tl.sum(number[:, None] * mean, axis=0) / count
    middle += tl.sum(number[:, None] * (mean - middle[None, :]), axis=0) / count
    off = mean - middle[None, :]
    tl.store(part_ptr + d, middle, mask=d < D)
    tl.store(part_ptr + D + d, tl.sum(squares + number[:, None] * off * off, axis=0), mask=d < D)
    tl.store(part_ptr + 2 * D + d, tl.zeros([BD], tl.float32) + rows, mask=d < D)


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
    left, squares = tl.zeros([BLOCK, COLUMNS], tl.float32), tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        there = (part < parts)[:, None] & (d < D)[None, :]
        at = parts_ptr + (part.to(tl.int64) * (3 * D))[:, None] + d[None, :]
        off = tl.load(at, mask=there, other=0.0) - mean[None, :]
        weighted = off * tl.load(at + 2 * D, mask=there, other=0.0)
        left += weighted
        squares += off * weighted + tl.load(at + D, mask=there, other=0.0)
    more = tl.sum(left, axis=0) / number
    tl.store(moments_ptr + d, mean + more, mask=d < D)
    tl.store(moments_ptr + D + d, tl.maximum(tl.sum(squares, axis=0) / number - more * more, 0.0), mask=d < D)
    tl.store(moments_ptr + 2 * D + d, number, mask=d < D)


@triton.jit
def pushes(dmoments_ptr, moments_ptr, D: tl.constexpr, BD: tl.constexpr):
    """`push` and `pull` [BD]: the gradients of mean and variance [2, D] add `push + pull y` to that of y."""
    d = tl.arange(0, BD)
    inside = d < D
    share = 1.0 / tl.load(moments_ptr + 2 * D + d, mask=inside, other=1.0)
    mean = tl.load(moments_ptr + d, mask=inside, other=0.0)
    pull = tl.load(dmoments_ptr + D + d, mask=inside, other=0.0) * (2 * share)
    return tl.load(dmoments_ptr + d, mask=inside, other=0.0) * share - pull * mean, pull
