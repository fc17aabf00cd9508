"""Triton kernels of the gated output: forward, first over the V columns of its rows, then over their D columns.

Shapes: N rows, H heads of width HV (V = H HV), D model width. A program has BM rows, all D columns (BD >= D of them
in a tile, with a mask), and walks through the values of a head in chunks of BC; where a head is wider than a chunk,
sums over it need a walk of their own. The weight comes folded: F = `gain W_o`, in the dtype of the products, so that
u = silu(gate) norm(m) everywhere (`weight_kernels`). The number of rows is never a constant of a kernel.

Two kernels instead of one, here and in `kernels_backward`: what both hold at once leaves a processor too few programs
to hide the memory's latency. Dropout is drawn where a matrix unit's layout of the rows has the bits at hand.
"""

import triton
import triton.language as tl

from chela.ops.dropout_kernels import keep
from chela.ops.gated_output.moment_kernels import add_up, counted


@triton.jit
def load_values(x_rows, column, there, HV: tl.constexpr, BC: tl.constexpr):
    """A head's columns `column : column + BC` of rows of m or gate [BM, BC], zero outside."""
    v = tl.arange(0, BC)
    inside = there
    if HV % BC != 0:
        inside = there & (v < HV - column % HV)[None, :]
    return tl.load(x_rows + (column + v)[None, :], mask=inside, other=0.0)


@triton.jit
def load_weight(weight_ptr, column, D: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
                BC: tl.constexpr):  # fmt: skip
    """The same columns of the folded weight [BD, BC]."""
    d, v = tl.arange(0, BD)[:, None], tl.arange(0, BC)[None, :]
    pointer = weight_ptr + d * V + (column + v)
    if (BD == D) & (HV % BC == 0):
        return tl.load(pointer)
    return tl.load(pointer, mask=(d < D) & (v < HV - column % HV), other=0.0)


@triton.jit(do_not_specialize=["n"])
def value_products(
    product_ptr,  # [N, D]: F u; -inf where dropout strikes
    inverse_ptr,  # [N] float32: a single head's 1 / root mean square, kept for the backward pass
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart: gate, h, p
    weight_ptr,  # [D, V], folded
    seed_ptr,  # []
    n,
    m_row,
    mixed_row,
    threshold,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
    STREAM: tl.constexpr,
    NORM: tl.constexpr,
    DROPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of u = silu(gate) norm(m) and the weight."""
    V: tl.constexpr = H * HV
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    there = (row < n)[:, None]
    m_rows = m_ptr + (row * m_row)[:, None]
    mixed_rows = mixed_ptr + (row * mixed_row)[:, None]
    product = tl.zeros([BM, BD], tl.float32)
    for head in range(H):
        if NORM & (BC < HV):
            squares = tl.zeros([BM], tl.float32)
            for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
                m = load_values(m_rows, column, there, HV, BC).to(tl.float32)
                squares += tl.sum(m * m, axis=1)
            inverse = tl.rsqrt(squares / HV + EPS)[:, None]
            if H == 1:
                tl.store(inverse_ptr + row[:, None], inverse, mask=there)
        for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
            m = load_values(m_rows, column, there, HV, BC).to(tl.float32)
            gate = load_values(mixed_rows, column, there, HV, BC).to(tl.float32)
            weight = load_weight(weight_ptr, column, D, HV, V, BD, BC)
            u = m * gate * tl.sigmoid(gate)
            if NORM:
                if BC >= HV:
                    inverse = tl.rsqrt(tl.sum(m * m, axis=1) / HV + EPS)[:, None]
                    if H == 1:
                        tl.store(inverse_ptr + row[:, None], inverse, mask=there)
                u *= inverse
            product = tl.dot(u.to(weight.dtype), tl.trans(weight), product, input_precision="tf32x3")  # [BM, BD]
    if DROPS:
        kept = keep(tl.load(seed_ptr), row, 0, threshold, STREAM, BD)
        product = tl.where(kept, product, float("-inf"))
    to = product_ptr + (row * D)[:, None] + d[None, :]
    tl.store(to, product.to(product_ptr.dtype.element_ty), mask=there & (d < D)[None, :])


@triton.jit
def before_silu(product_rows, h_rows, bias, there, DROPS: tl.constexpr):
    """What SiLU is taken of [BM, BD] in float32, zero where dropped; the product likewise; what is kept."""
    product = tl.load(product_rows, mask=there, other=0.0).to(tl.float32)
    kept = there
    if DROPS:
        kept = product > float("-inf")
        product = tl.where(kept, product, 0.0)
    pre = product + tl.load(h_rows, mask=there, other=0.0).to(tl.float32) + bias
    return pre, product, kept


@triton.jit
def load_bias(bias_ptr, D: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr):
    """[1, BD] in float32, zero if there is none."""
    d = tl.arange(0, BD)
    bias = tl.zeros([BD], tl.float32)
    if BIAS:
        bias += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit(do_not_specialize=["n"])
def open_gate(
    y_ptr,  # [N, D]
    parts_ptr,  # [programs, 3, D] float32: each program's share of the output's moments
    product_ptr,  # [N, D]
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart: gate, h, p
    residual_ptr,  # [N, D], rows residual_row apart
    bias_ptr,  # [D]
    mask_ptr,  # [N], which rows count for the moments
    n,
    mixed_row,
    residual_row,
    scale,
    V: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    TURNS: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Output: residual + sigmoid(p) (dropout(silu(h + F u + b)) - residual), BM rows in each turn."""
    d = tl.arange(0, BD)
    bias = load_bias(bias_ptr, D, BD, BIAS)
    number, mean, squares = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) * TURNS + turn) * BM + tl.arange(0, BM)
        there = (row < n)[:, None] & (d < D)[None, :]
        at = (row * D)[:, None] + d[None, :]
        h_rows = mixed_ptr + (row * mixed_row)[:, None] + (V + d)[None, :]
        pre, _, kept = before_silu(product_ptr + at, h_rows, bias, there, DROPS)
        p = tl.load(h_rows + D, mask=there, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=there, other=0.0)
        residual = residual.to(tl.float32)
        a = pre * tl.sigmoid(pre)
        if DROPS:
            a = tl.where(kept, a * scale, 0.0)
        y = (residual + tl.sigmoid(p) * (a - residual)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, y, mask=there)
        if MOMENTS:
            counts = counted(mask_ptr, row, n, MASKED)
            number, mean, squares = add_up(number, mean, squares, y.to(tl.float32), counts)
    if MOMENTS:
        part = parts_ptr + tl.program_id(0).to(tl.int64) * (3 * D) + d
        tl.store(part, mean, mask=d < D)
        tl.store(part + D, squares, mask=d < D)
        tl.store(part + 2 * D, number, mask=d < D)
