"""Triton kernels of the gated output: backward, first over the D columns of its rows, then over their V columns.

Words as in `kernels`. The norm's derivative needs a sum over each head, of dnorm = F^T dpre silu(gate); for a single
head the first kernel has it without a look at the values:

    sum over V of dnorm norm(m) = dpre . F u = dpre . product
"""

import triton
import triton.language as tl

from chela.ops.gated_output.kernels import before_silu, load_bias, load_values, load_weight
from chela.ops.gated_output.moment_kernels import counted, of_moments


@triton.jit(do_not_specialize=["n"])
def gate_gradients(
    dmixed_ptr,  # [N, V + 2D]: here the gradients of h and p
    dresidual_ptr,  # [N, D]
    mean_ptr,  # [N] float32: mean of dnorm norm(m) over a single head
    partial_ptr,  # [programs, D] float32: each program's share of the bias's gradient
    dy_ptr,  # [N, D], rows dy_row apart
    dmoments_ptr,  # [2 or more, D] float32: gradients of mean and variance of the output
    moments_ptr,  # [3, D] float32
    product_ptr,  # [N, D], as the forward pass left it
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    residual_ptr,  # [N, D], rows residual_row apart
    bias_ptr,  # [D]
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
    TURNS: tl.constexpr,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Gradients of residual, h (which is dpre) and p, the bias's shares and, with MEAN, the single head's means."""
    d = tl.arange(0, BD)
    bias = load_bias(bias_ptr, D, BD, BIAS)
    dbias = tl.zeros([BD], tl.float32)
    for turn in range(TURNS):
        row = (tl.program_id(0).to(tl.int64) * TURNS + turn) * BM + tl.arange(0, BM)
        there = (row < n)[:, None] & (d < D)[None, :]
        at = (row * D)[:, None] + d[None, :]
        h_rows = mixed_ptr + (row * mixed_row)[:, None] + (V + d)[None, :]
        dh_rows = dmixed_ptr + (row * (V + 2 * D))[:, None] + (V + d)[None, :]
        dy = tl.load(dy_ptr + (row * dy_row)[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
        pre, product, kept = before_silu(product_ptr + at, h_rows, bias, there, DROPS)
        p = tl.load(h_rows + D, mask=there, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + (row * residual_row)[:, None] + d[None, :], mask=there, other=0.0)
        residual = residual.to(tl.float32)
        mix, open_pre = tl.sigmoid(p), tl.sigmoid(pre)
        a = pre * open_pre
        if DROPS:
            a = tl.where(kept, a * scale, 0.0)
        if MOMENTS:
            y = residual + mix * (a - residual)
            dy += of_moments(dmoments_ptr, moments_ptr, y, counted(mask_ptr, row, n, MASKED), D, BD)
        tl.store(dresidual_ptr + at, (dy * (1 - mix)).to(dresidual_ptr.dtype.element_ty), mask=there)
        dp = dy * (a - residual) * mix * (1 - mix)
        tl.store(dh_rows + D, dp.to(dmixed_ptr.dtype.element_ty), mask=there)
        dpre = dy * mix * open_pre * (1 + pre * (1 - open_pre))
        if DROPS:
            dpre = tl.where(kept, dpre * scale, 0.0)
        dbias += tl.sum(dpre, axis=0)
        dpre = dpre.to(dmixed_ptr.dtype.element_ty)
        tl.store(dh_rows, dpre, mask=there)
        if MEAN:
            tl.store(mean_ptr + row, tl.sum(dpre.to(tl.float32) * product, axis=1) / V, mask=row < n)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + d, dbias, mask=d < D)


@triton.jit(do_not_specialize=["n"])
def value_gradients(
    dm_ptr,  # [N, V]
    dmixed_ptr,  # [N, V + 2D]: the gradient of h is read, that of gate written
    u_ptr,  # [N, V]
    m_ptr,  # [N, V], rows m_row apart
    mixed_ptr,  # [N, V + 2D], rows mixed_row apart
    weight_ptr,  # [D, V], folded
    inverse_ptr,  # [N] float32, as the forward pass left it
    mean_ptr,  # [N] float32
    n,
    m_row,
    mixed_row,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of m and gate, and u for the weight's gradient."""
    V: tl.constexpr = H * HV
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    there = (row < n)[:, None]
    m_rows = m_ptr + (row * m_row)[:, None]
    mixed_rows = mixed_ptr + (row * mixed_row)[:, None]
    dm_rows, u_rows = dm_ptr + (row * V)[:, None], u_ptr + (row * V)[:, None]
    dmixed_rows = dmixed_ptr + (row * (V + 2 * D))[:, None]
    dtype: tl.constexpr = dm_ptr.dtype.element_ty
    dpre = tl.load(dmixed_rows + (V + d)[None, :], mask=there & (d < D)[None, :], other=0.0)
    if NORM & (H == 1):
        inverse = tl.load(inverse_ptr + row[:, None], mask=there, other=0.0)
        mean = tl.load(mean_ptr + row[:, None], mask=there, other=0.0)
    for head in range(H):
        if NORM & (H > 1) & (BC < HV):
            squares, total = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
            for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
                m = load_values(m_rows, column, there, HV, BC).to(tl.float32)
                gate = load_values(mixed_rows, column, there, HV, BC).to(tl.float32)
                weight = load_weight(weight_ptr, column, D, HV, V, BD, BC)
                du = tl.dot(dpre, weight, input_precision="tf32x3")  # [BM, BC]
                squares += tl.sum(m * m, axis=1)
                total += tl.sum(du * m * gate * tl.sigmoid(gate), axis=1)
            inverse = tl.rsqrt(squares / HV + EPS)[:, None]
            mean = inverse * total[:, None] / HV
        for column in tl.range(head * HV, (head + 1) * HV, BC, num_stages=STAGES):
            m = load_values(m_rows, column, there, HV, BC).to(tl.float32)
            gate = load_values(mixed_rows, column, there, HV, BC).to(tl.float32)
            weight = load_weight(weight_ptr, column, D, HV, V, BD, BC)
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
