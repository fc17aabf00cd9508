"""The gradients of the feed-forward part in Triton; names as in `kernels`, which has the maths of the forward pass.

    dz = m2 dy          da = dz w2'         dh = m1 da silu'(h)       dxh = dh w1
    dx = rstd (dxh - mean(dxh) - xh mean(dxh xh)) [+ dy]              without the first mean if the norm is not centred
    G = xh' dh,  dW2 = dz' a                dW1 = gain G' + db1 shift'      dgain = sum_f W1 G'      dshift = W1' db1

GATED, with W3 shift in u as in h,

    dh = m1 da u silu'(h)                   du = m1 da silu(h)     dxh = dh w1 + du w3     BOUNDED, du (1 - u^2)
    G3 = xh' du                             dW3 = gain G3' + sum(du) shift'   and dgain, dshift the sums for W1 and W3

and for batch norm, whose statistics are given,

    dx = rstd dxh [+ dy]                    dmean = -rstd gain dshift       drstd = gain dgain / rstd

One kernel gives dx, xh and dz, and one the weights' gradients from the latter two: it walks with a slice of F over a
share of the rows and keeps its part of G and dW2 in registers. Both recompute h and da, which costs less than the
memory traffic of anything F wide.
"""

import triton
import triton.language as tl

from chela.ops.activation_kernels import sigmoid, tanh
from chela.ops.dropout_kernels import keep, keep_loaded
from chela.ops.feed_forward.kernels import normalise, product, rows_of, slice_of, statistics


@triton.jit
def _hidden(
    xh, dz, w1, w2, w3, b1_ptr, b3_ptr, seed_ptr, row, first, threshold, scale,
    GATED: tl.constexpr, BOUNDED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Dh, du and a [M, BLOCK_F] from rows [M, BLOCK_D] and a slice of the weights; not GATED, du is dh."""
    h = product(xh, w1, b1_ptr, first)
    da = tl.dot(dz, tl.trans(w2), input_precision="tf32x3")
    gate = sigmoid(h)
    a = h * gate
    slope = gate + a * (1 - gate)
    if DROP:
        factor = tl.where(keep(tl.load(seed_ptr), row, first, threshold, 0, h.shape[1]), scale, 0.0)
        a *= factor
        slope *= factor
    dh = da * slope
    du = dh
    if GATED:
        du = da * a
        u = product(xh, w3, b3_ptr, first)
        if BOUNDED:
            u = tanh(u)
            du *= 1 - u * u
        dh *= u
        a *= u
    return dh, du, a


@triton.jit(do_not_specialize=["rows", "threshold"])
def row_gradients(
    dx_ptr,  # [ROWS, D]
    xh_ptr,  # [ROWS, D] for the weights' gradients, in the products' type; x itself if it is not written
    dz_ptr,  # [ROWS, D], likewise; dy itself
    bits_ptr,  # [ROWS, BLOCK_D / 8] uint8: what dropout keeps of the output, on its way between threads
    dy_ptr,  # [ROWS, D]
    x_ptr,  # [ROWS, D]
    w1_ptr,  # folded
    b1_ptr,  # folded
    w2_ptr,  # folded
    w3_ptr,  # folded, GATED
    b3_ptr,  # folded, GATED
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
        dz = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            kept = keep_loaded(bits_ptr, tl.load(seed_ptr), row, row < rows, threshold, 1, BLOCK_D)
            dz *= tl.where(kept, scale, 0.0)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # what is loaded goes to matrix units through shared memory, what is computed does not
    xh_tile = tl.load(xh_ptr + at, mask=inside, other=0.0)
    dz_tile = tl.load(dz_ptr + at, mask=inside, other=0.0)
    dxh = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        w1 = slice_of(w1_ptr, first, BLOCK_F, BLOCK_D)
        w2 = slice_of(w2_ptr, first, BLOCK_F, BLOCK_D)
        w3 = slice_of(w3_ptr, first, BLOCK_F, BLOCK_D) if GATED else w1
        dh, du, _ = _hidden(
            xh_tile, dz_tile, w1, w2, w3, b1_ptr, b3_ptr, seed_ptr, row, first, threshold, scale,
            GATED, BOUNDED, DROP,
        )  # fmt: skip
        dxh = tl.dot(dh.to(w1.dtype), w1, dxh, input_precision="tf32x3")
        if GATED:
            dxh = tl.dot(du.to(w3.dtype), w3, dxh, input_precision="tf32x3")
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
    parts_ptr,  # [splits, SIZE] float32: this split's G, dW2 [, G3], each [BLOCK_D, F], db1 [, db3] [F], db2 [BLOCK_D]
    xh_ptr,  # [ROWS, D]
    dz_ptr,  # [ROWS, D]
    w1_ptr,  # folded
    b1_ptr,  # folded
    w2_ptr,  # folded
    w3_ptr,  # folded, GATED
    b3_ptr,  # folded, GATED
    seed_ptr,  # []
    rows,
    splits,
    threshold,
    scale,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a slice of F, summed over every `splits`-th tile of rows."""
    first = tl.program_id(0) * BLOCK_F
    split = tl.program_id(1)
    w1 = slice_of(w1_ptr, first, BLOCK_F, BLOCK_D)
    w2 = slice_of(w2_ptr, first, BLOCK_F, BLOCK_D)
    w3 = slice_of(w3_ptr, first, BLOCK_F, BLOCK_D) if GATED else w1
    g = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    dw2 = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    g3 = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    # Of the biases' gradients a thread keeps what its own rows add; threads meet after the loop.
    db1 = tl.zeros([BLOCK_M // 16, 8, BLOCK_F], tl.float32)
    db3 = tl.zeros([BLOCK_M // 16, 8, BLOCK_F], tl.float32)
    db2 = tl.zeros([16, BLOCK_D], tl.float32)
    for tile in tl.range(split, tl.cdiv(rows, BLOCK_M), splits, num_stages=STAGES):
        row, at, inside = rows_of(tile, rows, BLOCK_M, BLOCK_D, D)
        xh = tl.load(xh_ptr + at, mask=inside, other=0.0)
        dz = tl.load(dz_ptr + at, mask=inside, other=0.0)
        if first == 0:
            db2 += tl.sum(tl.reshape(dz.to(tl.float32), [BLOCK_M // 16, 16, BLOCK_D]), axis=0)
        dh, du, a = _hidden(
            xh, dz, w1, w2, w3, b1_ptr, b3_ptr, seed_ptr, row, first, threshold, scale, GATED, BOUNDED, DROP
        )
        # Rows beyond the end have dz = 0 and so dh = du = 0.
        db1 += tl.sum(tl.reshape(dh, [BLOCK_M // 16, 2, 8, BLOCK_F]), axis=1)
        g = tl.dot(tl.trans(xh), dh.to(xh.dtype), g, input_precision="tf32x3")
        dw2 = tl.dot(tl.trans(dz), a.to(dz.dtype), dw2, input_precision="tf32x3")
        if GATED:
            db3 += tl.sum(tl.reshape(du, [BLOCK_M // 16, 2, 8, BLOCK_F]), axis=1)
            g3 = tl.dot(tl.trans(xh), du.to(xh.dtype), g3, input_precision="tf32x3")
    f, d = first + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    MATRIX: tl.constexpr = BLOCK_D * F
    HIDDEN: tl.constexpr = GATED + 1  # products behind the norm
    SIZE: tl.constexpr = (HIDDEN + 1) * MATRIX + HIDDEN * F + BLOCK_D
    part = parts_ptr + split.to(tl.int64) * SIZE
    at = d[:, None] * F + f[None, :]
    tl.store(part + at, g)
    tl.store(part + MATRIX + at, dw2)
    part += (HIDDEN + 1) * MATRIX
    tl.store(part + f, tl.sum(tl.sum(db1, axis=0), axis=0))
    if GATED:
        tl.store(part - MATRIX + at, g3)
        tl.store(part + F + f, tl.sum(tl.sum(db3, axis=0), axis=0))
    if first == 0:
        tl.store(part + HIDDEN * F + d, tl.sum(db2, axis=0))


@triton.jit(do_not_specialize=["splits"])
def sum_parts(
    dw1_ptr,  # [F, D]
    db1_ptr,  # [F]
    dw2_ptr,  # [D, F]
    db2_ptr,  # [D]
    dw3_ptr,  # [F, D], GATED
    dgain_ptr,  # [D]
    dshift_ptr,  # [D]
    dmean_ptr,  # [D]
    drstd_ptr,  # [D]
    parts_ptr,  # as `weight_gradients` left them, F padded
    w1_ptr,  # [F, D]
    w3_ptr,  # [F, D], GATED
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
    GATED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gradients of everything that belongs to one column d of D, summed over the splits always in the same order."""
    d = tl.program_id(0)
    f = tl.arange(0, BLOCK_F)
    MATRIX: tl.constexpr = BLOCK_D * PADDED
    HIDDEN: tl.constexpr = GATED + 1  # products behind the norm
    SIZE: tl.constexpr = (HIDDEN + 1) * MATRIX + HIDDEN * PADDED + BLOCK_D
    g = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    dw2 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    g3 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    db1 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    db3 = tl.zeros([BLOCK_S, BLOCK_F], tl.float32)
    db2 = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        there = (split < splits)[:, None] & (f < F)[None, :]
        part = parts_ptr + split.to(tl.int64) * SIZE
        at = part[:, None] + f[None, :]
        biases = at + (HIDDEN + 1) * MATRIX
        g += tl.load(at + d * PADDED, mask=there, other=0.0)
        dw2 += tl.load(at + MATRIX + d * PADDED, mask=there, other=0.0)
        db1 += tl.load(biases, mask=there, other=0.0)
        if GATED:
            g3 += tl.load(at + 2 * MATRIX + d * PADDED, mask=there, other=0.0)
            db3 += tl.load(biases + PADDED, mask=there, other=0.0)
        db2 += tl.load(part + (HIDDEN + 1) * MATRIX + HIDDEN * PADDED + d, mask=split < splits, other=0.0)
    g, dw2, db1, db2 = tl.sum(g, axis=0), tl.sum(dw2, axis=0), tl.sum(db1, axis=0), tl.sum(db2, axis=0)
    g3, db3 = tl.sum(g3, axis=0), tl.sum(db3, axis=0)
    tl.store(dw2_ptr + d * F + f, dw2.to(dw2_ptr.dtype.element_ty), mask=f < F)
    tl.store(db2_ptr + d, db2.to(db2_ptr.dtype.element_ty))
    if d == 0:
        tl.store(db1_ptr + f, db1.to(db1_ptr.dtype.element_ty), mask=f < F)
    if GAIN:
        gain = tl.load(gain_ptr + d * GAIN_STEP).to(tl.float32)
        w1 = tl.load(w1_ptr + f * D + d, mask=f < F, other=0.0).to(tl.float32)
        dgain, dshift = tl.sum(w1 * g, axis=0), tl.sum(w1 * db1, axis=0)
        g *= gain
        if GATED:
            w3 = tl.load(w3_ptr + f * D + d, mask=f < F, other=0.0).to(tl.float32)
            dgain += tl.sum(w3 * g3, axis=0)
            dshift += tl.sum(w3 * db3, axis=0)
            g3 *= gain
        tl.store(dgain_ptr + d, dgain)
        if SHIFT:
            shift = tl.load(shift_ptr + d).to(tl.float32)
            g += db1 * shift
            g3 += db3 * shift
            tl.store(dshift_ptr + d, dshift.to(dshift_ptr.dtype.element_ty))
            if BATCH:
                rstd = tl.load(rstd_ptr + d).to(tl.float32)
                tl.store(dmean_ptr + d, (-rstd * gain * dshift).to(dmean_ptr.dtype.element_ty))
                tl.store(drstd_ptr + d, (gain * dgain / rstd).to(drstd_ptr.dtype.element_ty))
    tl.store(dw1_ptr + f * D + d, g.to(dw1_ptr.dtype.element_ty), mask=f < F)
    if GATED:
        tl.store(dw3_ptr + f * D + d, g3.to(dw3_ptr.dtype.element_ty), mask=f < F)
