"""The gradients of the feed-forward part in Triton; names as in `kernels`, which has the maths of the forward pass.

    dz = m2 dy          da = dz w2'         dh = m1 da silu'(h)       dxh = dh w1
    dx = rstd (dxh - mean(dxh) - xh mean(dxh xh)) [+ dy]              without the first mean if the norm is not centred
    G = xh' dh,  dW2 = dz' a                dW1 = gain G' + db1 shift'      dgain = sum_f W1 G'      dshift = W1' db1

and for batch norm, whose statistics are given,

    dx = rstd dxh [+ dy]                    dmean = -rstd gain dshift       drstd = gain dgain / rstd

One kernel gives dx, xh and dz, and one the weights' gradients from the latter two: it walks with a slice of F over a
share of the rows and keeps its part of G and dW2 in registers. Both recompute h and da, which costs less than the
memory traffic of anything F wide.
"""

import triton
import triton.language as tl

from chela.ops.dropout_kernels import keep
from chela.ops.feed_forward.kernels import dropped, normalise, rows_of, sigmoid, slice_of, statistics


@triton.jit
def _hidden(xh, dz, weights, b1_ptr, seed_ptr, row, first, threshold, scale, DROP: tl.constexpr):
    """Dh and a [M, BLOCK_F] from rows [M, BLOCK_D] and a slice of the weights."""
    w1, w2 = weights
    b1 = tl.load(b1_ptr + first + tl.arange(0, w1.shape[0]))
    h = tl.dot(xh, tl.trans(w1), input_precision="tf32x3") + b1[None, :]
    da = tl.dot(dz, tl.trans(w2), input_precision="tf32x3")
    gate = sigmoid(h)
    a = h * gate
    slope = gate + a * (1 - gate)
    if DROP:
        factor = tl.where(keep(tl.load(seed_ptr), row, first, threshold, 0, h.shape[1]), scale, 0.0)
        a *= factor
        slope *= factor
    return da * slope, a


@triton.jit(do_not_specialize=["rows", "threshold"])
def row_gradients(
    dx_ptr,  # [ROWS, D]
    xh_ptr,  # [ROWS, D] for the weights' gradients, in the products' type; x itself if it is not written
    dz_ptr,  # [ROWS, D], likewise; dy itself
    dy_ptr,  # [ROWS, D]
    x_ptr,  # [ROWS, D]
    w1_ptr,  # folded
    b1_ptr,  # folded
    w2_ptr,  # folded
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
    DROP: tl.constexpr,
    OWN: tl.constexpr,  # x is the residual as well
    WRITE_XH: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a tile of BLOCK_M rows of x. The weights pass through: waiting programs hide each other's loads."""
    tile = tl.program_id(0)
    row, at, inside = rows_of(tile, rows, BLOCK_M, BLOCK_D, D)
    if WRITE_XH:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        of_batch = statistics(mean_ptr, rstd_ptr, NORM, D, BLOCK_D)
        xh, rstd = normalise(x, inside, of_batch, EPS, NORM, D)
        tl.store(xh_ptr + at, xh.to(xh_ptr.dtype.element_ty), mask=inside)
    if WRITE_DZ:
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dz = dropped(dy, seed_ptr, row, 0, threshold, scale, 1, DROP)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # what is loaded goes to matrix units through shared memory, what is computed does not
    xh_tile = tl.load(xh_ptr + at, mask=inside, other=0.0)
    dz_tile = tl.load(dz_ptr + at, mask=inside, other=0.0)
    dxh = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        weights = slice_of(w1_ptr, w2_ptr, first, BLOCK_F, BLOCK_D)
        dh, _ = _hidden(xh_tile, dz_tile, weights, b1_ptr, seed_ptr, row, first, threshold, scale, DROP)
        dxh = tl.dot(dh.to(xh_tile.dtype), weights[0], dxh, input_precision="tf32x3")
    dx = dxh
    if (NORM != "none") & (NORM != "batch"):
        xh = tl.load(xh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx -= xh * (tl.sum(dxh * xh, axis=1) / D)[:, None]
        if NORM == "layer":
            dx -= (tl.sum(dxh, axis=1) / D)[:, None]
    if NORM != "none":
        dx *= rstd
    if OWN:
        dx += tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "splits"])
def weight_gradients(
    parts_ptr,  # [splits, SIZE] float32: this split's G [BLOCK_D, F], dW2 [BLOCK_D, F], db1 [F], db2 [BLOCK_D]
    xh_ptr,  # [ROWS, D]
    dz_ptr,  # [ROWS, D]
    w1_ptr,  # folded
    b1_ptr,  # folded
    w2_ptr,  # folded
    seed_ptr,  # []
    rows,
    splits,
    threshold,
    scale,
    D: tl.constexpr,
    F: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a slice of F, summed over every `splits`-th tile of rows."""
    first = tl.program_id(0) * BLOCK_F
    split = tl.program_id(1)
    weights = slice_of(w1_ptr, w2_ptr, first, BLOCK_F, BLOCK_D)
    g = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    dw2 = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    # Of db1 and db2 a thread keeps what its own rows add; threads meet after the loop.
    db1 = tl.zeros([BLOCK_M // 16, 8, BLOCK_F], tl.float32)
    db2 = tl.zeros([16, BLOCK_D], tl.float32)
    for tile in tl.range(split, tl.cdiv(rows, BLOCK_M), splits, num_stages=STAGES):
        row, at, inside = rows_of(tile, rows, BLOCK_M, BLOCK_D, D)
        xh = tl.load(xh_ptr + at, mask=inside, other=0.0)
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0)
        if first == 0:
            db2 += tl.sum(tl.reshape(dz.to(tl.float32), [BLOCK_M // 16, 16, BLOCK_D]), axis=0)
        dh, a = _hidden(xh, dz, weights, b1_ptr, seed_ptr, row, first, threshold, scale, DROP)
        # Rows beyond the end have dz = 0 and so dh = 0.
        db1 += tl.sum(tl.reshape(dh, [BLOCK_M // 16, 2, 8, BLOCK_F]), axis=1)
        g = tl.dot(tl.trans(xh), dh.to(xh.dtype), g, input_precision="tf32x3")
        dw2 = tl.dot(tl.trans(dz), a.to(dz.dtype), dw2, input_precision="tf32x3")
    f, d = first + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    SIZE: tl.constexpr = 2 * BLOCK_D * F + F + BLOCK_D
    part = parts_ptr + split.to(tl.int64) * SIZE
    tl.store(part + d[:, None] * F + f[None, :], g)
    tl.store(part + BLOCK_D * F + d[:, None] * F + f[None, :], dw2)
    tl.store(part + 2 * BLOCK_D * F + f, tl.sum(tl.sum(db1, axis=0), axis=0))
    if first == 0:
        tl.store(part + 2 * BLOCK_D * F + F + d, tl.sum(db2, axis=0))


@triton.jit(do_not_specialize=["splits"])
def sum_parts(
    dw1_ptr,  # [F, D]
    db1_ptr,  # [F]
    dw2_ptr,  # [D, F]
    db2_ptr,  # [D]
    dgain_ptr,  # [D]
    dshift_ptr,  # [D]
    dmean_ptr,  # [D]
    drstd_ptr,  # [D]
    parts_ptr,  # as `weight_gradients` left them, F padded
    w1_ptr,  # [F, D]
    gain_ptr,  # [D], or [1] and GAIN_STEP = 0
    shift_ptr,  # [D]
    rstd_ptr,  # [D]
    splits,
    D: tl.constexpr,
    F: tl.constexpr,
    PADDED: tl.constexpr,
    GAIN: tl.constexpr,
    GAIN_STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gradients of everything that belongs to one column d of D, summed over the splits always in the same order."""
    d = tl.program_id(0)
    f = tl.arange(0, BLOCK_F)
    SIZE: tl.constexpr = 2 * BLOCK_D * PADDED + PADDED + BLOCK_D
    g = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    dw2 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    db1 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    db2 = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = (split < splits)[:, None] & (f < F)[None, :]
        part = parts_ptr + split.to(tl.int64) * SIZE
        at = part[:, None] + f[None, :]
        g += tl.load(at + d * PADDED, mask=there, other=0.0)
        dw2 += tl.load(at + (BLOCK_D + d) * PADDED, mask=there, other=0.0)
        db1 += tl.load(at + 2 * BLOCK_D * PADDED, mask=there, other=0.0)
        db2 += tl.load(part + (2 * BLOCK_D + 1) * PADDED + d, mask=split < splits, other=0.0)
    g, dw2, db1, db2 = tl.sum(g, axis=0), tl.sum(dw2, axis=0), tl.sum(db1, axis=0), tl.sum(db2, axis=0)
    tl.store(dw2_ptr + d * F + f, dw2.to(dw2_ptr.dtype.element_ty), mask=f < F)
    tl.store(db2_ptr + d, db2.to(db2_ptr.dtype.element_ty))
    if d == 0:
        tl.store(db1_ptr + f, db1.to(db1_ptr.dtype.element_ty), mask=f < F)
    dw1 = g
    if GAIN:
        w1 = tl.load(w1_ptr + f * D + d, mask=f < F, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + d * GAIN_STEP).to(tl.float32)
        dw1 *= gain
        dgain = tl.sum(w1 * g, axis=0)
        tl.store(dgain_ptr + d, dgain)
        if SHIFT:
            dw1 += db1 * tl.load(shift_ptr + d).to(tl.float32)
            dshift = tl.sum(w1 * db1, axis=0)
            tl.store(dshift_ptr + d, dshift.to(dshift_ptr.dtype.element_ty))
            if BATCH:
                rstd = tl.load(rstd_ptr + d).to(tl.float32)
                tl.store(dmean_ptr + d, (-rstd * gain * dshift).to(dmean_ptr.dtype.element_ty))
                tl.store(drstd_ptr + d, (gain * dgain / rstd).to(drstd_ptr.dtype.element_ty))
    tl.store(dw1_ptr + f * D + d, dw1.to(dw1_ptr.dtype.element_ty), mask=f < F)
