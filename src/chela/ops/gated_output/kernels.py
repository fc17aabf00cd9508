"""Triton kernels of the gated output: what is done to its rows before and after the product, forward and backward.

Shapes: N rows, H heads of width HV (V = H HV), D model width. The products themselves, u F^T forward and dpre F
backward, are torch's: a kernel that made its operands on the way took twice as long as these and the products together
(docs/log.md). A program has BM rows of a head (all BV >= HV columns of it), or TILES times BM rows of all D channels
(BD >= D), whose sums each thread keeps to itself until the last tile. The number of rows is never a constant of a
kernel.
"""

import triton
import triton.language as tl

from chela.ops.activation_kernels import sigmoid
from chela.ops.dropout_kernels import keep_loaded, kept_before
from chela.ops.moment_kernels import counted, pushes, store_part, take_in


@triton.jit
def _rows_of_head(n, BM: tl.constexpr, BV: tl.constexpr, HV: tl.constexpr):
    """A program's rows [BM, 1], its columns of V [1, BV], and which of these there are [BM, BV]."""
    row = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    v = tl.arange(0, BV)[None, :]
    return row, tl.program_id(1) * HV + v, (row < n) & (v < HV)


@triton.jit(do_not_specialize=["n"])
def values_forward(
    u_ptr,  # [N, V]
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart: gate, h, p
    n,
    m_row,
    mixed_row,
    V: tl.constexpr,
    HV: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    """What the product is of: u = silu(gate) norm(m)."""
    row, v, there = _rows_of_head(n, BM, BV, HV)
    m = tl.load(m_ptr + row * m_row + v, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(mixed_ptr + row * mixed_row + v, mask=there, other=0.0).to(tl.float32)
    u = m * gate * sigmoid(gate)
    if NORM:
        u *= tl.rsqrt(tl.sum(m * m, axis=1) / HV + EPS)[:, None]
    tl.store(u_ptr + row * V + v, u.to(u_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n"])
def values_backward(
    dm_ptr,  # [N, V]
    dmixed_ptr,  # [N, V + 2D]
    u_ptr,  # [N, V]
    du_ptr,  # [N, V]
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    n,
    m_row,
    mixed_row,
    V: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Gradients of m and gate; and u again, for the weight's."""
    row, v, there = _rows_of_head(n, BM, BV, HV)
    du = tl.load(du_ptr + row * V + v, mask=there, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + row * m_row + v, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(mixed_ptr + row * mixed_row + v, mask=there, other=0.0).to(tl.float32)
    open = sigmoid(gate)
    dm = du * gate * open  # of the norm
    if NORM:
        inverse = tl.rsqrt(tl.sum(m * m, axis=1) / HV + EPS)[:, None]
        m *= inverse
        dm = inverse * (dm - m * (tl.sum(dm * m, axis=1) / HV)[:, None])
    dgate = du * m * open * (1 + gate * (1 - open))
    tl.store(u_ptr + row * V + v, (m * gate * open).to(u_ptr.dtype.element_ty), mask=there)
    tl.store(dm_ptr + row * V + v, dm.to(dm_ptr.dtype.element_ty), mask=there)
    tl.store(dmixed_ptr + row * (V + 2 * D) + v, dgate.to(dmixed_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n"])
def gate_forward(
    y_ptr,  # [N, D]
    pre_ptr,  # [N, D]: the product, and after it what SiLU is taken of, for the backward pass
    bits_ptr,  # [N, BD / 8] uint8: what dropout keeps, likewise
    parts_ptr,  # [programs, 3, D] float32: each program's share of the output's moments
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    residual_ptr,  # [N, D], rows residual_row apart
    bias_ptr,  # [D]
    mask_ptr,  # [N], which rows count for the moments
    seed_ptr,  # []
    n,
    mixed_row,
    residual_row,
    threshold,
    scale,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
    STREAM: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    KEEP: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Output: residual + sigmoid(p) (dropout(silu(h + product + b)) - residual)."""
    d = tl.arange(0, BD)
    first = tl.program_id(0).to(tl.int64) * (TILES * BM)
    if BIAS:
        bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    number = tl.zeros([BM], tl.float32)
    mean, squares = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for tile in range(TILES):
        row = first + tile * BM + tl.arange(0, BM)
        exists = row < n
        there = exists[:, None] & (d < D)[None, :]
        mixed_rows = mixed_ptr + (row * mixed_row)[:, None] + (V + d)[None, :]
        at = (row * D)[:, None] + d[None, :]
        pre = tl.load(pre_ptr + at, mask=there, other=0.0).to(tl.float32)
        pre += tl.load(mixed_rows, mask=there, other=0.0).to(tl.float32)
        p = tl.load(mixed_rows + D, mask=there, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=there, other=0.0)
        residual = residual.to(tl.float32)
        if BIAS:
            pre += bias
        a = pre * sigmoid(pre)
        if DROPS:
            kept = keep_loaded(bits_ptr, tl.load(seed_ptr), row, exists, threshold, STREAM, BD)
            a = tl.where(kept, a * scale, 0.0)
        if KEEP:
            tl.store(pre_ptr + at, pre.to(pre_ptr.dtype.element_ty), mask=there)
        y = (residual + sigmoid(p) * (a - residual)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=there)
        if MOMENTS:
            number, mean, squares = take_in(number, mean, squares, y.to(tl.float32), counted(mask_ptr, row, n, MASKED))
    if MOMENTS:
        store_part(parts_ptr + tl.program_id(0).to(tl.int64) * (3 * D), number, mean, squares, D, BD)


@triton.jit(do_not_specialize=["n"])
def gate_backward(
    dmixed_ptr,  # [N, V + 2D]
    dresidual_ptr,  # [N, D]
    partial_ptr,  # [programs, D] float32: each program's share of the bias's gradient
    dy_ptr,  # [N, D], rows dy_row apart
    dmoments_ptr,  # [2 or more, D] float32: gradients of mean and variance of the output
    moments_ptr,  # [3, D] float32
    pre_ptr,  # [N, D], as the forward pass left it
    bits_ptr,  # [N, BD / 8] uint8, likewise
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    residual_ptr,  # [N, D], rows residual_row apart
    mask_ptr,  # [N]
    n,
    dy_row,
    mixed_row,
    residual_row,
    scale,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
    DROPS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Gradients of h (which is the product's, too), p and the residual, and the bias's shares."""
    d = tl.arange(0, BD)
    first = tl.program_id(0).to(tl.int64) * (TILES * BM)
    if MOMENTS:
        push, pull = pushes(dmoments_ptr, moments_ptr, D, BD)
    total = tl.zeros([BM, BD], tl.float32)
    for tile in range(TILES):
        row = first + tile * BM + tl.arange(0, BM)
        exists = row < n
        there = exists[:, None] & (d < D)[None, :]
        at = (row * D)[:, None] + d[None, :]
        dy = tl.load(dy_ptr + (row * dy_row)[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + at, mask=there, other=0.0).to(tl.float32)
        p = tl.load(mixed_ptr + (row * mixed_row)[:, None] + (V + D + d)[None, :], mask=there, other=0.0)
        residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=there, other=0.0)
        residual = residual.to(tl.float32)
        mix, open = sigmoid(p.to(tl.float32)), sigmoid(pre)
        a = pre * open
        if DROPS:
            factor = tl.where(kept_before(bits_ptr, row, exists, BD), scale, 0.0)
            a *= factor
        if MOMENTS:
            y = residual + mix * (a - residual)
            dy += tl.where(counted(mask_ptr, row, n, MASKED)[:, None], push[None, :] + pull[None, :] * y, 0.0)
        tl.store(dresidual_ptr + at, (dy * (1 - mix)).to(dresidual_ptr.dtype.element_ty), mask=there)
        dpre = dy * mix * open * (1 + pre * (1 - open))
        if DROPS:
            dpre *= factor
        dp = dy * (a - residual) * mix * (1 - mix)
        dmixed_rows = dmixed_ptr + (row * (V + 2 * D))[:, None] + (V + d)[None, :]
        tl.store(dmixed_rows, dpre.to(dmixed_ptr.dtype.element_ty), mask=there)
        tl.store(dmixed_rows + D, dp.to(dmixed_ptr.dtype.element_ty), mask=there)
        total += dpre
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)
