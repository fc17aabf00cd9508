"""Triton kernels of batch norm: moments of the rows, the rows normalised, and the two sums that its derivative needs.

Rows are [N, D]. A program has TILES times BM rows of all D channels (BD >= D), whose sums each thread keeps to itself
until the last tile, or, where nothing is summed, BM rows. The number of rows is never a constant of a kernel.
"""

import triton
import triton.language as tl

from chela.ops.moment_kernels import counted, store_part, take_in


@triton.jit
def _tile(first, n, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Rows from `first` on: their numbers [BM], places [BM, BD] in memory without gaps, and which of them exist."""
    row, d = first + tl.arange(0, BM), tl.arange(0, BD)
    return row, (row * D)[:, None] + d[None, :], (row < n)[:, None] & (d < D)[None, :]


@triton.jit
def _by_channel(moments_ptr, eps, D: tl.constexpr, BD: tl.constexpr):
    """Mean of each channel and inverse of its standard deviation [1, BD]."""
    d = tl.arange(0, BD)
    mean = tl.load(moments_ptr + d, mask=d < D, other=0.0)
    variance = tl.load(moments_ptr + D + d, mask=d < D, other=1.0)
    return mean[None, :], (1 / tl.sqrt(variance + eps))[None, :]


@triton.jit(do_not_specialize=["n"])
def moments_of_parts(
    parts_ptr,  # [programs, 3, D] float32
    x_ptr,  # [N, D]
    mask_ptr,  # [N], which rows count
    n,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Mean, squares around it and number of each program's rows that count."""
    program = tl.program_id(0).to(tl.int64)
    number = tl.zeros([BM], tl.float32)
    mean, squares = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for tile in range(TILES):
        row, at, there = _tile((program * TILES + tile) * BM, n, D, BM, BD)
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        number, mean, squares = take_in(number, mean, squares, x, counted(mask_ptr, row, n, MASKED))
    store_part(parts_ptr + program * (3 * D), number, mean, squares, D, BD)


@triton.jit(do_not_specialize=["n"])
def normalise(
    y_ptr,  # [N, D]
    x_ptr,  # [N, D]
    moments_ptr,  # [3, D] float32
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    n,
    eps,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Every row less the mean, times rstd weight, and bias."""
    d = tl.arange(0, BD)
    mean, rstd = _by_channel(moments_ptr, eps, D, BD)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    _, at, there = _tile(tl.program_id(0).to(tl.int64) * BM, n, D, BM, BD)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, ((x - mean) * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n"])
def sums_of_parts(
    parts_ptr,  # [programs, 2, D] float32
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    moments_ptr,  # [3, D] float32
    n,
    eps,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums over each program's rows of dy and of dy (x - mean) rstd."""
    program, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    mean, rstd = _by_channel(moments_ptr, eps, D, BD)
    plain, weighted = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for tile in range(TILES):
        _, at, there = _tile((program * TILES + tile) * BM, n, D, BM, BD)
        dy = tl.load(dy_ptr + at, mask=there, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        plain += dy
        weighted += dy * ((x - mean) * rstd)  # dy is zero where there is no row
    at = parts_ptr + program * (2 * D) + d
    tl.store(at, tl.sum(plain, axis=0), mask=d < D)
    tl.store(at + D, tl.sum(weighted, axis=0), mask=d < D)
