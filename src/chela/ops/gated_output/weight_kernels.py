"""Triton kernels for the parameters of the gated output: what is made of them before, and their gradients after.

With the weight folded, F = gain W_o, and its gradient dF = dpre^T u, those of its factors follow without another look
at the rows: dW_o = gain dF, dgain = sum over D of W_o dF.
"""

import triton
import triton.language as tl


@triton.jit
def fold(
    folded_ptr,  # [D, V]
    weight_ptr,  # [D, V]
    gain_ptr,  # [V]
    D: tl.constexpr,
    V: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """F = gain W_o, in the dtype of the products."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < D * V
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight *= tl.load(gain_ptr + at % V, mask=inside, other=0.0).to(tl.float32)
    tl.store(folded_ptr + at, weight.to(folded_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "share"])
def multiply(
    partial_ptr,  # [shares, D, V] float32
    dpre_ptr,  # [N, D], rows dpre_row apart
    u_ptr,  # [N, V]
    n,
    share,
    dpre_row,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dF, summed over a share of the rows: a program has BV of the V columns."""
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, n)
    d = tl.arange(0, BD)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    total = tl.zeros([BD, BV], tl.float32)
    for first in tl.range(begin, end, BM, num_stages=STAGES):
        row = first + tl.arange(0, BM)
        there = (row < end)[:, None]
        row = row.to(tl.int64)[:, None]
        dpre = tl.load(dpre_ptr + row * dpre_row + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        u = tl.load(u_ptr + row * V + v[None, :], mask=there & (v < V)[None, :], other=0.0)
        total = tl.dot(tl.trans(dpre), u, total, input_precision="tf32x3")  # [BD, BV]
    at = (tl.program_id(0) * D + d)[:, None] * V + v[None, :]
    tl.store(partial_ptr + at, total, mask=(d < D)[:, None] & (v < V)[None, :])


@triton.jit
def _finish_weight(
    dweight_ptr, dgain_ptr, partial_ptr, weight_ptr, gain_ptr, first_column, shares,
    D: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """BV columns of dW_o and dgain."""
    entry = tl.arange(0, BD * BV)
    d, v = entry // BV, first_column + entry % BV
    at = d * V + v
    inside = (d < D) & (v < V)
    sums = tl.zeros([SHARES, BD * BV], tl.float32)
    for first in range(0, shares, SHARES):
        part = first + tl.arange(0, SHARES)
        there = (part < shares)[:, None] & inside[None, :]
        sums += tl.load(partial_ptr + (part * (D * V))[:, None] + at[None, :], mask=there, other=0.0)
    dfolded = tl.sum(sums, axis=0)
    dweight = dfolded
    if NORM:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dgain = tl.sum(tl.reshape(weight * dfolded, (BD, BV)), axis=0)
        column = first_column + tl.arange(0, BV)
        tl.store(dgain_ptr + column, dgain.to(dgain_ptr.dtype.element_ty), mask=column < V)
        dweight *= tl.load(gain_ptr + v, mask=inside, other=0.0).to(tl.float32)
    tl.store(dweight_ptr + at, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _finish_bias(dbias_ptr, partial_ptr, first_column, programs, D: tl.constexpr, BLOCK: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """COLUMNS entries of the bias's gradient."""
    d = first_column + tl.arange(0, COLUMNS)
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        there = (program < programs)[:, None] & (d < D)[None, :]
        at = (program.to(tl.int64) * D)[:, None] + d[None, :]
        sums += tl.load(partial_ptr + at, mask=there, other=0.0)
    tl.store(dbias_ptr + d, tl.sum(sums, axis=0).to(dbias_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["shares", "programs"])
def finish(
    dweight_ptr,  # [D, V]
    dgain_ptr,  # [V]
    dbias_ptr,  # [D]
    partial_ptr,  # [shares, D, V] float32
    bias_partial_ptr,  # [programs, D] float32
    weight_ptr,  # [D, V]
    gain_ptr,  # [V]
    shares,
    programs,
    D: tl.constexpr,
    V: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of W_o, gain and bias: sums over all parts, always in the same order."""
    tiles: tl.constexpr = (V + BV - 1) // BV  # programs that do W_o and gain
    pid = tl.program_id(0)
    if pid < tiles:
        _finish_weight(
            dweight_ptr, dgain_ptr, partial_ptr, weight_ptr, gain_ptr, pid * BV, shares, D, V, NORM, BD, BV, SHARES
        )
    elif BIAS:
        _finish_bias(dbias_ptr, bias_partial_ptr, (pid - tiles) * COLUMNS, programs, D, BLOCK, COLUMNS)
