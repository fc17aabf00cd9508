"""The feed-forward part in Triton, forward, and what its backward kernels share: everything F wide stays on chip.

Rows are positions, [ROWS, D]; F is the hidden width. Weights come folded (`fold`): the norm's gain and shift belong to
the first product, both matrices are [F, D], in the type the products take, padded with zeros to F a multiple of
BLOCK_F and D = BLOCK_D. xh are the rows after the norm, before gain and shift.

    xh = (x - mean) rstd                    w1 = W1 gain,  b1 = b1 + W1 shift
    h = xh w1' + b1     a = m1 silu(h)      y = residual + m2 (a w2 + b2)        m1, m2: dropout's masks, scaled

and GATED (SwiGLU), with a third matrix,

    w3 = W3 gain,  b3 = W3 shift            u = xh w3' + b3     a = m1 silu(h) u     BOUNDED, its tanh for u

Sums are float32; what enters a product is rounded to the products' type. There is a program for each tile of rows, and
the weights pass through slice by slice: programs that keep them in shared memory and walk over tiles took half as long
again (docs/log.md).
"""

import triton
import triton.language as tl

from chela.ops.activation_kernels import sigmoid, tanh
from chela.ops.dropout_kernels import keep


@triton.jit
def _fold(
    w,  # pointers [BLOCK_F, BLOCK_D]
    inside,
    bias,  # [BLOCK_F]
    gain_ptr,
    shift_ptr,
    D: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_STEP: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """A matrix behind the norm and its bias, with the norm's gain and shift in them."""
    d = tl.arange(0, inside.shape[1])
    w = tl.load(w, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        bias += tl.sum(w * tl.load(shift_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :], axis=1)
    if GAIN:
        w *= tl.load(gain_ptr + d * GAIN_STEP, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return w, bias


@triton.jit
def fold(
    w1_out_ptr,  # [F padded, BLOCK_D]
    w2_out_ptr,  # [F padded, BLOCK_D]
    w3_out_ptr,  # [F padded, BLOCK_D], GATED
    b1_out_ptr,  # [F padded] float32
    b3_out_ptr,  # [F padded] float32, GATED
    w1_ptr,  # [F, D]
    b1_ptr,  # [F]
    w2_ptr,  # [D, F]
    w3_ptr,  # [F, D], GATED
    gain_ptr,  # [D], or [1] and GAIN_STEP = 0
    shift_ptr,  # [D]
    F: tl.constexpr,
    D: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weights as the other kernels read them."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    inside = (f < F)[:, None] & (d < D)[None, :]
    at = f[:, None] * BLOCK_D + d[None, :]
    b1 = tl.load(b1_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    w1, b1 = _fold(w1_ptr + f[:, None] * D + d[None, :], inside, b1, gain_ptr, shift_ptr, D, GAIN, GAIN_STEP, SHIFT)
    w2 = tl.load(w2_ptr + d[None, :] * F + f[:, None], mask=inside, other=0.0)
    tl.store(w1_out_ptr + at, w1.to(w1_out_ptr.dtype.element_ty))
    tl.store(w2_out_ptr + at, w2.to(w2_out_ptr.dtype.element_ty))
    tl.store(b1_out_ptr + f, b1)
    if GATED:
        b3 = tl.zeros([BLOCK_F], tl.float32)
        w3, b3 = _fold(w3_ptr + f[:, None] * D + d[None, :], inside, b3, gain_ptr, shift_ptr, D, GAIN, GAIN_STEP, SHIFT)
        tl.store(w3_out_ptr + at, w3.to(w3_out_ptr.dtype.element_ty))
        tl.store(b3_out_ptr + f, b3)


@triton.jit
def statistics(mean_ptr, rstd_ptr, NORM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of batch norm, [BLOCK_D]; zeros with any other."""
    d = tl.arange(0, BLOCK_D)
    mean, rstd = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if NORM == "batch":
        mean = tl.load(mean_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return mean, rstd


@triton.jit
def normalise(x, inside, of_batch, EPS: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr):
    """Rows after the norm and what they were multiplied by, [M, 1] or [1, BLOCK_D].

    x [M, BLOCK_D] is float32 and zero where not `inside`; `of_batch` are `statistics`. Rows beyond the end come out of
    batch norm as they may: nobody reads them.
    """
    if NORM == "batch":
        mean, rstd = of_batch
        factor = rstd[None, :]
        x -= mean[None, :]
    elif NORM == "none":
        factor = tl.full([1, 1], 1.0, tl.float32)
    else:
        if NORM == "layer":
            x -= (tl.sum(x, axis=1) / D)[:, None]
            if x.shape[1] > D:
                x = tl.where(inside, x, 0.0)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    return x * factor, factor


@triton.jit
def dropped(x, seed_ptr, row, first, threshold, scale, STREAM: tl.constexpr, DROP: tl.constexpr):
    """A tile [M, N] whose first column is `first` with some entries zero and the others scaled."""
    if DROP:
        kept = keep(tl.load(seed_ptr), row, first, threshold, STREAM, x.shape[1])
        x *= tl.where(kept, scale, 0.0)
    return x


@triton.jit
def slice_of(w_ptr, first, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):
    """A folded matrix's slice of F, [BLOCK_F, BLOCK_D]."""
    return tl.load(w_ptr + (first + tl.arange(0, BLOCK_F))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def product(xh, w, b_ptr, first):
    """Xh w' + b [M, BLOCK_F], for a slice w of F and its part of the bias."""
    bias = tl.load(b_ptr + first + tl.arange(0, w.shape[0]))
    return tl.dot(xh, tl.trans(w), input_precision="tf32x3") + bias[None, :]


@triton.jit
def rows_of(tile, rows, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Numbers of a tile's rows [BLOCK_M], and where its entries are and whether, [BLOCK_M, BLOCK_D]."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    return row, row.to(tl.int64)[:, None] * D + d[None, :], (row < rows)[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=["rows", "threshold"])
def feed_forward(
    out_ptr,  # [ROWS, D]
    x_ptr,  # [ROWS, D]
    residual_ptr,  # [ROWS, D]
    w1_ptr,  # folded
    b1_ptr,  # folded
    w2_ptr,  # folded
    w3_ptr,  # folded, GATED
    b3_ptr,  # folded, GATED
    b2_ptr,  # [D]
    mean_ptr,  # [D], of batch norm
    rstd_ptr,  # [D]
    seed_ptr,  # []
    rows,
    threshold,
    scale,
    D: tl.constexpr,
    F: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of a tile of BLOCK_M rows."""
    d = tl.arange(0, BLOCK_D)
    row, at, inside = rows_of(tl.program_id(0), rows, BLOCK_M, BLOCK_D, D)
    of_batch = statistics(mean_ptr, rstd_ptr, NORM, D, BLOCK_D)
    xh, _ = normalise(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), inside, of_batch, EPS, NORM, D)
    xh = xh.to(w1_ptr.dtype.element_ty)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        w1 = slice_of(w1_ptr, first, BLOCK_F, BLOCK_D)
        w2 = slice_of(w2_ptr, first, BLOCK_F, BLOCK_D)
        w3 = slice_of(w3_ptr, first, BLOCK_F, BLOCK_D) if GATED else w1
        h = product(xh, w1, b1_ptr, first)
        a = h * sigmoid(h)
        if GATED:
            u = product(xh, w3, b3_ptr, first)
            a *= tanh(u) if BOUNDED else u
        a = dropped(a, seed_ptr, row, first, threshold, scale, 0, DROP)
        acc = tl.dot(a.to(w2.dtype), w2, acc, input_precision="tf32x3")
    b2 = tl.load(b2_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    acc = dropped(acc + b2[None, :], seed_ptr, row, 0, threshold, scale, 1, DROP)
    residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (residual + acc).to(out_ptr.dtype.element_ty), mask=inside)
