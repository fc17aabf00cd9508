"""Triton kernels of `two_stage.py`: N = N0 Ni times, n = n0 Ni + p and k = k0 + N0 q.

Outer stage, over tiles of p, with theta = exp(i pi / 2N) in both factors:

    A[k0, p] = sum_n0 F0[k0, n0] x[n0, p],   F0 = exp(i pi n0 / 2 N0 - 2 pi i k0 n0 / N0) / sqrt(N0)
    z[k0, p] = A W,                          W = exp(i pi p / 2 N - 2 pi i k0 p / N)

Inner stage, for each k0: the Fourier transform of z[k0] over its Ni = N1 N2 points as in `on_chip_kernels.py`, without
theta. Every factor is unitary. Spectra are [R, 2, N0, Ni], real and imaginary parts in float16, over a power of two a
tile of the outer stage [R, Ni / TILE] or a row of the inner one [R, N0].
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.on_chip_steps import power_of


@jit("lags", "ahead", "xr", "wr", "wl", "inner")
def outer_forward(
    x,
    w,
    out,
    scales,
    f0,
    twiddle,
    lags,
    ahead,
    xr,
    xl,
    wr,
    wl,
    inner,
    TAPS: tl.constexpr,
    AHEAD: tl.constexpr,
    N0: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows x [R, N] of the input -> the outer stage; 16 inner = Ni.

    TAPS: x holds `lags` taps a row instead, and AHEAD, w holds `ahead` more into the future, lag -l as -i at N - l.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, c = tl.arange(0, N0), tile * TILE + tl.arange(0, TILE)
    step = inner * 16
    grid, square = a.to(tl.int64)[:, None] * step + c[None, :], a[:, None] * N0 + a[None, :]  # [N0, TILE], [N0, N0]
    size = N0 * step.to(tl.int64)
    if TAPS:
        v = tl.load(x + row * xr + grid * xl, mask=grid < lags, other=0).to(tl.float32)
    else:
        v = tl.load(x + row * size + grid).to(tl.float32)
    u = v
    if AHEAD:
        lag = size - grid
        u = tl.load(w + row * wr + (lag - 1) * wl, mask=lag <= ahead, other=0).to(tl.float32)
    scale = power_of(v, u)
    v = (v / scale).to(tl.float16)
    fr, fi = tl.load(f0 + square), tl.load(f0 + N0 * N0 + square)
    zr, zi = tl.dot(fr, v), tl.dot(fi, v)
    if AHEAD:
        u = (u / scale).to(tl.float16)
        zr, zi = tl.dot(fi, u, zr), tl.dot(-fr, u, zi)
    tr, ti = tl.load(twiddle + grid), tl.load(twiddle + size + grid)
    tl.store(out + row * 2 * size + grid, (zr * tr - zi * ti).to(tl.float16))
    tl.store(out + row * 2 * size + size + grid, (zr * ti + zi * tr).to(tl.float16))
    tl.store(scales + row * tl.num_programs(1) + tile, scale)


@jit("factor", "lags", "ahead", "inner")
def outer_inverse(
    z,
    powers,
    out,
    future,
    f0,
    twiddle,
    factor,
    lags,
    ahead,
    inner,
    TAPS: tl.constexpr,
    AHEAD: tl.constexpr,
    N0: tl.constexpr,
    TILE: tl.constexpr,
):
    """Undo the outer stage: the real part times `factor` -> out [R, N].

    TAPS: to out [R, lags] only, and AHEAD, minus the imaginary part at N - l to future [R, ahead] at lag l.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, c = tl.arange(0, N0), tile * TILE + tl.arange(0, TILE)
    step = inner * 16
    grid, square = a.to(tl.int64)[:, None] * step + c[None, :], a[:, None] * N0 + a[None, :]  # [N0, TILE], [N0, N0]
    size = N0 * step.to(tl.int64)
    scale = tl.load(powers + row * N0 + a)[:, None]
    zr = tl.load(z + row * 2 * size + grid).to(tl.float32) * scale
    zi = tl.load(z + row * 2 * size + size + grid).to(tl.float32) * scale
    tr, ti = tl.load(twiddle + grid), tl.load(twiddle + size + grid)
    er, ei = zr * tr + zi * ti, zi * tr - zr * ti
    power = power_of(er, ei)
    er, ei = (er / power).to(tl.float16), (ei / power).to(tl.float16)
    fr, fi = tl.load(f0 + 2 * N0 * N0 + square), tl.load(f0 + 3 * N0 * N0 + square)
    y = (tl.dot(fi, ei, tl.dot(fr, er)) * (power * factor)).to(out.dtype.element_ty)
    if TAPS:
        tl.store(out + row * lags + grid, y, mask=grid < lags)
    else:
        tl.store(out + row * size + grid, y)
    if AHEAD:
        y = tl.dot(fi, er, tl.dot(fr, -ei)) * (power * factor)
        lag = size - grid
        tl.store(future + row * ahead + lag - 1, y.to(future.dtype.element_ty), mask=lag <= ahead)


@jit()
def _transform(
    z,
    scales,
    row,
    k0,
    f1,
    f2,
    twiddle,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TILE: tl.constexpr,
):
    """Inner transform of row k0: [N1, N2], real and imaginary parts in float32, over a power of two."""
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid, square = a[:, None] * N2 + c[None, :], a[:, None] * N1 + a[None, :]
    at = z + (row * 2 * N0 + k0) * (N1 * N2) + grid
    scale = tl.load(scales + row * (N1 * N2 // TILE) + grid // TILE)
    vr, vi = tl.load(at).to(tl.float32) * scale, tl.load(at + N0 * N1 * N2).to(tl.float32) * scale
    power = power_of(vr, vi)
    vr, vi = (vr / power).to(tl.float16), (vi / power).to(tl.float16)
    fr, fi = tl.load(f1 + square), tl.load(f1 + N1 * N1 + square)
    zr, zi = tl.dot(fi, -vi, tl.dot(fr, vr)), tl.dot(fi, vr, tl.dot(fr, vi))
    wr, wi = tl.load(twiddle + grid), tl.load(twiddle + N1 * N2 + grid)
    br, bi = (zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16)
    square = c[:, None] * N2 + c[None, :]
    gr, gi = tl.load(f2 + square), tl.load(f2 + N2 * N2 + square)
    return tl.dot(-bi, gi, tl.dot(br, gr)), tl.dot(bi, gr, tl.dot(br, gi)), power


@jit()
def _inverse(
    pr, pi, out, powers, row, k0, factor, f1, f2, twiddle, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """Undo the inner transform of row k0 and store it times `factor`, a part of which goes to its power of two."""
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid, square = a[:, None] * N2 + c[None, :], c[:, None] * N2 + c[None, :]
    power = power_of(pr, pi)
    pr, pi = (pr / power).to(tl.float16), (pi / power).to(tl.float16)
    gr, gi = tl.load(f2 + square), tl.load(f2 + N2 * N2 + square)
    dr, di = tl.dot(pi, gi, tl.dot(pr, gr)), tl.dot(-pr, gi, tl.dot(pi, gr))
    wr, wi = tl.load(twiddle + grid), tl.load(twiddle + N1 * N2 + grid)
    er, ei = (dr * wr + di * wi).to(tl.float16), (di * wr - dr * wi).to(tl.float16)
    square = a[:, None] * N1 + a[None, :]
    fr, fi = tl.load(f1 + square), tl.load(f1 + N1 * N1 + square)  # symmetric
    yr, yi = tl.dot(fi, ei, tl.dot(fr, er)), tl.dot(fi, -er, tl.dot(fr, ei))
    at = out + (row * 2 * N0 + k0) * (N1 * N2) + grid
    tl.store(at, yr.to(tl.float16))
    tl.store(at + N0 * N1 * N2, yi.to(tl.float16))
    tl.store(powers + row * N0 + k0, power * factor)


@jit()
def inner_spectra(
    z,
    scales,
    out,
    powers,
    f1,
    f2,
    twiddle,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TILE: tl.constexpr,
):
    """The inner transform of every row, over a power of two a row; out may be z."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cr, ci, power = _transform(z, scales, row, k0, f1, f2, twiddle, N0, N1, N2, TILE)
    more = power_of(cr, ci)
    at = out + (row * 2 * N0 + k0) * (N1 * N2) + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tl.store(at, (cr / more).to(tl.float16))
    tl.store(at + N0 * N1 * N2, (ci / more).to(tl.float16))
    tl.store(powers + row * N0 + k0, power * more)


@jit("batch")
def inner_convolve(
    z,
    scales,
    out,
    after,
    spectra,
    powers,
    f1,
    f2,
    twiddle,
    batch,
    MIRROR: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TILE: tl.constexpr,
):
    """Every row times its channel's spectrum (its conjugate, if MIRROR), back to before the inner transform."""
    row, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = row // batch
    cr, ci, power = _transform(z, scales, row, k0, f1, f2, twiddle, N0, N1, N2, TILE)
    at = spectra + (d * 2 * N0 + k0) * (N1 * N2) + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    lr, li = tl.load(at).to(tl.float32), tl.load(at + N0 * N1 * N2).to(tl.float32)
    if MIRROR:
        li = -li
    power *= tl.load(powers + d * N0 + k0)
    _inverse(cr * lr - ci * li, cr * li + ci * lr, out, after, row, k0, power, f1, f2, twiddle, N0, N1, N2)


@jit("batch")
def inner_correlate(
    g,
    g_scales,
    x,
    x_scales,
    out,
    after,
    f1,
    f2,
    twiddle,
    batch,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum over the batch of the spectrum of g times the conjugate of that of x, back to before the inner transform."""
    d, k0 = tl.program_id(0).to(tl.int64), tl.program_id(1)
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for b in range(batch):
        hr, hi, power = _transform(x, x_scales, d * batch + b, k0, f1, f2, twiddle, N0, N1, N2, TILE)
        gr, gi, more = _transform(g, g_scales, d * batch + b, k0, f1, f2, twiddle, N0, N1, N2, TILE)
        real += (hr * gr + hi * gi) * (power * more)
        imaginary += (hr * gi - hi * gr) * (power * more)
    _inverse(real, imaginary, out, after, d, k0, 1.0, f1, f2, twiddle, N0, N1, N2)
