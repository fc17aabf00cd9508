"""Triton kernels of the gated output: forward and backward over its rows.

Shapes: N rows, H heads of width HV (V = H HV), D model width. A program has BM rows, all D columns (BD >= D of them
in a tile, with a mask), and walks through the values of a head in chunks of BC. The weight comes folded: `gain W_o`,
in the dtype of the products, so that u = silu(gate) norm(m) everywhere (`weight_kernels`). The number of rows is never
a constant of a kernel.

Where a head is wider than a chunk, sums over it need a walk of their own, but for those of a single head in the
backward pass: the forward pass keeps the norm's inverse root, and of dnorm = F^T dpre silu(gate) the sum that the
norm's derivative needs is, without a look at the values,

    sum over V of dnorm norm(m) = dpre . F u = dpre . product
"""

import triton
import triton.language as tl

from chela.ops.dropout_kernels import keep
from chela.ops.gated_output.moment_kernels import add_up, counted, of_moments


@triton.jit
def _values(x_rows, column, there, HV: tl.constexpr, BC: tl.constexpr):
    """A head's columns `column : column + BC` of rows of m or gate [BM, BC], zero outside."""
    v = tl.arange(0, BC)
    inside = there
    if HV % BC != 0:
        inside = there & (v < HV - column % HV)[None, :]
    return tl.load(x_rows + (column + v)[None, :], mask=inside, other=0.0)


@triton.jit
def _weight(weight_ptr, column, D: tl.constexpr, HV: tl.constexpr, V: tl.constexpr, BD: tl.constexpr,
            BC: tl.constexpr):  # fmt: skip
    """The same columns of the folded weight [BD, BC]."""
    d, v = tl.arange(0, BD)[:, None], tl.arange(0, BC)[None, :]
    pointer = weight_ptr + d * V + (column + v)
    if (BD == D) & (HV % BC == 0):
        return tl.load(pointer)
    return tl.load(pointer, mask=(d < D) & (v < HV - column % HV), other=0.0)


@triton.jit(do_not_specialize=["n"])
def gated_output_forward(
    y_ptr,  # [N, D]
    product_ptr,  # [N, D]: F u, kept for the backward pass; -inf where dropout strikes
    inverse_ptr,  # [N] float32: a single head's 1 / root mean square, kept likewise
    parts_ptr,  # [programs, 3, D] float32: each program's share of the output's moments
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart: gate, h, p
    residual_ptr,  # [N, D], rows residual_row apart
    weight_ptr,  # [D, V], folded
    bias_ptr,  # [D]
    mask_ptr,  # [N], which rows count for the moments
    seed_ptr,  # []
    n,
    m_row,
    mixed_row,
    residual_row,
    threshold,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
    STREAM: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    KEEP: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Output: residual + sigmoid(p) (dropout(silu(h + u W^T + b)) - residual)."""
    V: tl.constexpr = H * HV
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    there = (row < n)[:, None]
    narrow = there & (d < D)[None, :]
    m_rows = m_ptr + (row * m_row)[:, None]
    mixed_rows = mixed_ptr + (row * mixed_row)[:, None]

    product = tl.zeros([BM, BD], tl.float32)
    for head in range(H):
        if NORM & (BC < HV):
            squares = tl.zeros([BM], tl.float32)
            for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
                m = _values(m_rows, column, there, HV, BC).to(tl.float32)
                squares += tl.sum(m * m, axis=1)
            inverse = tl.rsqrt(squares / HV + EPS)[:, None]
            if KEEP & (H == 1):
                tl.store(inverse_ptr + row[:, None], inverse, mask=there)
        for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
            m = _values(m_rows, column, there, HV, BC).to(tl.float32)
            gate = _values(mixed_rows, column, there, HV, BC).to(tl.float32)
            weight = _weight(weight_ptr, column, D, HV, V, BD, BC)
            if NORM & (BC >= HV):
                inverse = tl.rsqrt(tl.sum(m * m, axis=1) / HV + EPS)[:, None]
                if KEEP & (H == 1):
                    tl.store(inverse_ptr + row[:, None], inverse, mask=there)
            u = m * gate * tl.sigmoid(gate)
            if NORM:
                u *= inverse
            product = tl.dot(u.to(weight.dtype), tl.trans(weight), product, input_precision="tf32x3")  # [BM, BD]

    pre = product + tl.load(mixed_rows + (V + d)[None, :], mask=narrow, other=0.0).to(tl.float32)
    if BIAS:
        pre += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    p = tl.load(mixed_rows + (V + D + d)[None, :], mask=narrow, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=narrow, other=0.0)
    residual = residual.to(tl.float32)
    at = (row * D)[:, None] + d[None, :]
    a = pre * tl.sigmoid(pre)
    if DROPS:
        kept = keep(tl.load(seed_ptr), row, 0, threshold, STREAM, BD)
        a = tl.where(kept, a * scale, 0.0)
        product = tl.where(kept, product, float("-inf"))
    if KEEP:
        tl.store(product_ptr + at, product.to(product_ptr.dtype.element_ty), mask=narrow)
    y = (residual + tl.sigmoid(p) * (a - residual)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=narrow)
    if MOMENTS:
        counts = counted(mask_ptr, row, n, MASKED)
        add_up(parts_ptr + tl.program_id(0).to(tl.int64) * (3 * D), y.to(tl.float32), counts, D, BD)


@triton.jit(do_not_specialize=["n"])
def gated_output_backward(
    dm_ptr,  # [N, V]
    dmixed_ptr,  # [N, V + 2D]
    dresidual_ptr,  # [N, D]
    u_ptr,  # [N, V]
    partial_ptr,  # [programs, D] float32: each program's share of the bias's gradient
    dy_ptr,  # [N, D], rows dy_row apart
    dmoments_ptr,  # [2 or more, D] float32: gradients of mean and variance of the output
    moments_ptr,  # [3, D] float32
    product_ptr,  # [N, D], as the forward pass left it
    inverse_ptr,  # [N] float32, likewise
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    residual_ptr,  # [N, D], rows residual_row apart
    weight_ptr,  # [D, V], folded
    bias_ptr,  # [D]
    mask_ptr,  # [N]
    n,
    dy_row,
    m_row,
    mixed_row,
    residual_row,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of m, mixed and residual; u for the weight's gradient, and the bias's shares."""
    V: tl.constexpr = H * HV
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    there = (row < n)[:, None]
    narrow = there & (d < D)[None, :]
    at = (row * D)[:, None] + d[None, :]
    m_rows = m_ptr + (row * m_row)[:, None]
    mixed_rows = mixed_ptr + (row * mixed_row)[:, None]
    dm_rows, u_rows = dm_ptr + (row * V)[:, None], u_ptr + (row * V)[:, None]
    dmixed_rows = dmixed_ptr + (row * (V + 2 * D))[:, None]
    dtype: tl.constexpr = m_ptr.dtype.element_ty

    dy = tl.load(dy_ptr + (row * dy_row)[:, None] + d[None, :], mask=narrow, other=0.0).to(tl.float32)
    p = tl.load(mixed_rows + (V + D + d)[None, :], mask=narrow, other=0.0).to(tl.float32)
    product = tl.load(product_ptr + at, mask=narrow, other=0.0).to(tl.float32)
    if DROPS:
        kept = product > float("-inf")
        product = tl.where(kept, product, 0.0)
    pre = product + tl.load(mixed_rows + (V + d)[None, :], mask=narrow, other=0.0).to(tl.float32)
    if BIAS:
        pre += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=narrow, other=0.0)
    residual = residual.to(tl.float32)
    mix, open_pre = tl.sigmoid(p), tl.sigmoid(pre)
    a = pre * open_pre
    if DROPS:
        a = tl.where(kept, a * scale, 0.0)
    if MOMENTS:
        y = residual + mix * (a - residual)
        dy += of_moments(dmoments_ptr, moments_ptr, y, counted(mask_ptr, row, n, MASKED), D, BD)
    tl.store(dresidual_ptr + at, (dy * (1 - mix)).to(dresidual_ptr.dtype.element_ty), mask=narrow)
    dpre = dy * mix * open_pre * (1 + pre * (1 - open_pre))
    if DROPS:
        dpre = tl.where(kept, dpre * scale, 0.0)
    dp = dy * (a - residual) * mix * (1 - mix)
    tl.store(dmixed_rows + (V + D + d)[None, :], dp.to(dtype), mask=narrow)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, tl.sum(dpre, axis=0), mask=d < D)
    dpre = dpre.to(dtype)
    tl.store(dmixed_rows + (V + d)[None, :], dpre, mask=narrow)

    if NORM & (H == 1):
        inverse = tl.load(inverse_ptr + row[:, None], mask=there, other=0.0)
        mean = tl.sum(dpre.to(tl.float32) * product, axis=1)[:, None] / HV  # of dnorm norm
    for head in range(H):
        if NORM & (H > 1) & (BC < HV):
            squares, total = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
            for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
                m = _values(m_rows, column, there, HV, BC).to(tl.float32)
                gate = _values(mixed_rows, column, there, HV, BC).to(tl.float32)
                weight = _weight(weight_ptr, column, D, HV, V, BD, BC)
                du = tl.dot(dpre, weight, input_precision="tf32x3")  # [BM, BC]
                squares += tl.sum(m * m, axis=1)
                total += tl.sum(du * m * gate * tl.sigmoid(gate), axis=1)
            inverse = tl.rsqrt(squares / HV + EPS)[:, None]
            mean = inverse * total[:, None] / HV  # of dnorm norm
        for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
            m = _values(m_rows, column, there, HV, BC).to(tl.float32)
            gate = _values(mixed_rows, column, there, HV, BC).to(tl.float32)
            weight = _weight(weight_ptr, column, D, HV, V, BD, BC)
            du = tl.dot(dpre, weight, input_precision="tf32x3")  # [BM, BC]
            open = tl.sigmoid(gate)
            dm = du * gate * open
            if NORM:
                if (H > 1) & (BC >= HV):
                    inverse = tl.rsqrt(tl.sum(m * m, axis=1) / HV + EPS)[:, None]
                    mean = inverse * tl.sum(dm * m, axis=1)[:, None] / HV
                m *= inverse
                dm = inverse * (dm - m * mean)
            dgate = du * m * open * (1 + gate * (1 - open))
            u = m * gate * open
            v = column + tl.arange(0, BC)
            inside = there & (v < (head + 1) * HV)[None, :]
            tl.store(u_rows + v[None, :], u.to(dtype), mask=inside)
            tl.store(dmixed_rows + v[None, :], dgate.to(dtype), mask=inside)
            tl.store(dm_rows + v[None, :], dm.to(dtype), mask=inside)
