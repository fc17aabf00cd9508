"""Sums over rows for the gradients of weights in Triton: left^T right, and the sums of either's columns.

Rows are cut into shares, a program's part of each; whoever called adds the parts up, always in the same order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chela.ops.launch import ceil, grid, power


class Tile(NamedTuple):
    """How a program is cut. None of it depends on the number of rows."""

    rows: int
    columns: int
    """Most columns of `right` that a program has; of `left` it has all."""
    warps: int
    stages: int


TILES = {
    2: {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3), 256: Tile(64, 64, 8, 3)},
    4: {64: Tile(32, 64, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
}
"""By the bytes of a number and by the widest `left` they are for."""
SHARES = 64
"""Most shares of the rows."""


class Cut(NamedTuple):
    """What becomes of the rows."""

    tile: Tile
    share: int
    """Rows of a share."""
    shares: int


def cut(rows: int, left: int, dtype: torch.dtype) -> Cut:
    """Cut so many rows of a `left` so many columns wide."""
    tile = TILES[dtype.itemsize][max(64, power(left))]
    share = ceil(ceil(rows, SHARES), tile.rows) * tile.rows
    return Cut(tile, share, ceil(rows, share))


def multiply(
    parts: Tensor,
    left: Tensor,
    right: Tensor,
    how: Cut,
    *,
    left_sums: Tensor | None = None,
    right_sums: Tensor | None = None,
) -> None:
    """Fill `parts` [shares, D, V], whose last two axes are dense, with left^T right of each share.

    Args:
        parts: float32, as the sums.
        left: [N, D], rows evenly spaced, columns dense.
        right: [N, V], likewise.
        how: what `cut` says of them.
        left_sums: [shares, D] for the sums of left's columns, or None; strides over shares are those of `parts`.
        right_sums: [shares, V], likewise.
    """
    tile, (n, d), v = how.tile, left.shape, right.shape[1]
    columns = min(tile.columns, max(16, power(v)))
    grid(multiply_rows, how.shares, ceil(v, columns))(
        parts, left_sums, right_sums, left, right, n, how.share, left.stride(0), right.stride(0), parts.stride(0),
        D=d, V=v, BM=tile.rows, BD=max(64, power(d)), BV=columns, LEFT=left_sums is not None,
        RIGHT=right_sums is not None, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "share"])
def multiply_rows(
    parts_ptr,  # [shares, D, V] float32
    left_sums_ptr,  # [shares, D] float32
    right_sums_ptr,  # [shares, V] float32
    left_ptr,  # [N, D], rows left_row apart
    right_ptr,  # [N, V], rows right_row apart
    n,
    share,
    left_row,
    right_row,
    part,  # distance of two shares' parts and sums
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One share of the rows and BV columns of `right`."""
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, n)
    d = tl.arange(0, BD)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    total = tl.zeros([BD, BV], tl.float32)
    of_left, of_right = tl.zeros([BD], tl.float32), tl.zeros([BV], tl.float32)
    for first in tl.range(begin, end, BM, num_stages=STAGES):
        row = first + tl.arange(0, BM)
        there = (row < end)[:, None]
        row = row.to(tl.int64)[:, None]
        left = tl.load(left_ptr + row * left_row + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        right = tl.load(right_ptr + row * right_row + v[None, :], mask=there & (v < V)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="tf32x3")  # [BD, BV]
        if LEFT:
            of_left += tl.sum(left.to(tl.float32), axis=0)
        if RIGHT:
            of_right += tl.sum(right.to(tl.float32), axis=0)
    offset = tl.program_id(0).to(tl.int64) * part
    at = offset + d[:, None] * V + v[None, :]
    tl.store(parts_ptr + at, total, mask=(d < D)[:, None] & (v < V)[None, :])
    if LEFT:
        tl.store(left_sums_ptr + offset + d, of_left, mask=(d < D) & (tl.program_id(1) == 0))
    if RIGHT:
        tl.store(right_sums_ptr + offset + v, of_right, mask=v < V)
