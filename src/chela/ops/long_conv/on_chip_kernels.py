"""Triton kernels of `on_chip.py`: a row of N = N1 N2 times is transformed by one program.

With theta = exp(i pi / 2N), n = n1 N2 + n2 and k = k1 + N1 k2, the values of a row at the N roots of z^N = i are the
Fourier transform of theta^n x_n, in two steps with unitary factors:

    A[k1, n2] = sum_n1 F1[k1, n1] x[n1, n2],            F1 = exp(i pi n1 / 2 N1 - 2 pi i k1 n1 / N1) / sqrt(N1)
    C[k1, k2] = sum_n2 (A W)[k1, n2] F2[n2, k2],        W = exp(i pi n2 / 2 N - 2 pi i k1 n2 / N)

Tables: f1 [4, N1, N1] is F1 (real, imaginary) and its transpose; f2 [2, N2, N2] is F2, symmetric; twiddle [2, N1, N2].
Tiles are [N1, N2] unless said otherwise.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit()
def power_below(most):
    """The power of two that brings `most` to [1, 2); 2^-100 for zero."""
    return tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1e-30))))


@jit()
def power_of(re, im):
    """The power of two that brings the largest entry of two tiles to [1, 2); 2^-100 for zeros."""
    return power_below(tl.max(tl.max(tl.maximum(tl.abs(re), tl.abs(im)), 1), 0))


@jit()
def _load_row(pointer):
    """A row as float16 numbers below 2 and the power of two they were divided by."""
    v = tl.load(pointer).to(tl.float32)
    scale = power_of(v, v)
    return (v / scale).to(tl.float16), scale


@jit()
def _read(table, part: tl.constexpr, HELD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The real (0) or imaginary (1) part of a table [2, R, C]: HELD already, or where the pointer says."""
    if HELD:
        values = table[part]
    else:
        values = tl.load(table + part * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])
    return values


@jit()
def _both(table, HELD: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    return _read(table, 0, HELD, R, C), _read(table, 1, HELD, R, C)


@jit()
def _transform(v, tables, HELD: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Real row in float16 -> spectrum, real and imaginary parts in float32.

    Tables F1, F2 and W are HELD, or pointers to what is read where it is needed: that takes less room.
    """
    f1, f2, twiddle = tables
    zr, zi = tl.dot(_read(f1, 0, HELD, N1, N1), v), tl.dot(_read(f1, 1, HELD, N1, N1), v)
    wr, wi = _both(twiddle, HELD, N1, N2)
    br, bi = (zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16)
    gr, gi = _both(f2, HELD, N2, N2)
    return tl.dot(-bi, gi, tl.dot(br, gr)), tl.dot(bi, gr, tl.dot(br, gi))


@jit()
def _half_inverse(pr, pi, tables, HELD: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr):
    """Spectrum in float16 -> what F1 is still to be undone of, in float16."""
    _, f2, twiddle = tables
    gr, gi = _both(f2, HELD, N2, N2)
    dr, di = tl.dot(pi, gi, tl.dot(pr, gr)), tl.dot(-pr, gi, tl.dot(pi, gr))
    wr, wi = _both(twiddle, HELD, N1, N2)
    return (dr * wr + di * wi).to(tl.float16), (di * wr - dr * wi).to(tl.float16)


@jit("batch", "rows")
def convolve_rows(
    x,
    out,
    spectra,
    powers,
    f1,
    f2,
    twiddle,
    batch,
    rows,
    MIRROR: tl.constexpr,
    HELD: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """out[d, b] = x[d, b] times the spectrum of channel d (its conjugate, if MIRROR: the gradient of the input).

    A program has so many rows of a channel. Tables and spectrum are HELD, read once for all of them, where there is
    room.
    """
    d, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * rows
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tables, spectrum, transpose = (f1, f2, twiddle), spectra + d * (2 * N1 * N2), f1 + 2 * N1 * N1
    if HELD:
        tables = (_both(f1, False, N1, N1), _both(f2, False, N2, N2), _both(twiddle, False, N1, N2))
        spectrum, transpose = _both(spectrum, False, N1, N2), _both(transpose, False, N1, N1)
    power = tl.load(powers + d)
    for b in range(first, tl.minimum(batch, first + rows)):
        at = (d * batch + b) * (N1 * N2) + grid
        v, scale = _load_row(x + at)
        cr, ci = _transform(v, tables, HELD, N1, N2)
        lr, li = _both(spectrum, HELD, N1, N2)
        if MIRROR:
            li = -li
        pr, pi = (cr * lr - ci * li).to(tl.float16), (cr * li + ci * lr).to(tl.float16)
        er, ei = _half_inverse(pr, pi, tables, HELD, N1, N2)
        y = tl.dot(_read(transpose, 0, HELD, N1, N1), er)
        y = tl.dot(_read(transpose, 1, HELD, N1, N1), ei, y)
        tl.store(out + at, (y * (power * scale)).to(out.dtype.element_ty))


@jit("lags", "ahead", "kd", "rd", "rl")
def transform_taps(
    kernel,
    reverse,
    spectra,
    powers,
    lags,
    ahead,
    kd,
    kl,
    rd,
    rl,
    f1,
    f2,
    twiddle,
    AHEAD: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """spectra[d] = sqrt(N) times the transform of the taps, over a power of two powers[d]; lag -l is -i at N - l.

    Parts are below 1/2, so that no number of the product with a row is larger than the row's.
    """
    d = tl.program_id(0).to(tl.int64)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    v = tl.load(kernel + d * kd + grid.to(tl.int64) * kl, mask=grid < lags, other=0).to(tl.float32)
    w = v
    if AHEAD:
        lag = N1 * N2 - grid
        w = tl.load(reverse + d * rd + (lag - 1).to(tl.int64) * rl, mask=lag <= ahead, other=0).to(tl.float32)
    scale = power_of(v, w)
    tables = (f1, f2, twiddle)
    cr, ci = _transform((v / scale).to(tl.float16), tables, False, N1, N2)
    if AHEAD:
        er, ei = _transform((w / scale).to(tl.float16), tables, False, N1, N2)
        cr, ci = cr + ei, ci - er
    top = 4 * power_of(cr, ci)
    at = spectra + d * (2 * N1 * N2) + grid
    tl.store(at, cr / top)
    tl.store(at + N1 * N2, ci / top)
    tl.store(powers + d, scale * top * tl.sqrt((N1 * N2) * 1.0))


@jit("batch", "channels")
def correlate_rows(
    g, x, sums, f1, f2, twiddle, batch, channels, PART: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """sums[part, d] = sum over PART rows b of the spectrum of g[d, b] times the conjugate of that of x[d, b]."""
    d, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    tables = (f1, f2, twiddle)
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for b in range(part * PART, tl.minimum(batch, part * PART + PART)):
        at = (d * batch + b) * (N1 * N2) + grid
        v, size = _load_row(x + at)
        hr, hi = _transform(v, tables, False, N1, N2)
        hr, hi = hr.to(tl.float16), hi.to(tl.float16)  # while the next transform needs the registers
        v, scale = _load_row(g + at)
        gr, gi = _transform(v, tables, False, N1, N2)
        real += (hr * gr + hi * gi) * (size * scale)
        imaginary += (hr * gi - hi * gr) * (size * scale)
    at = sums + (part * channels + d) * (2 * N1 * N2) + grid
    tl.store(at, real)
    tl.store(at + N1 * N2, imaginary)


@jit("parts", "lags", "ahead")
def collect_rows(
    sums,
    d_kernel,
    d_reverse,
    lags,
    ahead,
    parts,
    f1,
    f2,
    twiddle,
    AHEAD: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Gradients of the taps: the real part of the inverse transform at lag l, and minus the imaginary one at N - l."""
    d = tl.program_id(0).to(tl.int64)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for part in range(parts):
        at = sums + (part * tl.num_programs(0) + d) * (2 * N1 * N2) + grid
        real += tl.load(at)
        imaginary += tl.load(at + N1 * N2)
    top = power_of(real, imaginary)
    er, ei = _half_inverse(
        (real / top).to(tl.float16), (imaginary / top).to(tl.float16), (f1, f2, twiddle), False, N1, N2
    )
    tr, ti = _both(f1 + 2 * N1 * N1, False, N1, N1)
    size = top * tl.sqrt((N1 * N2) * 1.0)
    past = tl.dot(ti, ei, tl.dot(tr, er)) * size
    tl.store(d_kernel + d * lags + grid, past.to(d_kernel.dtype.element_ty), mask=grid < lags)
    if AHEAD:
        future = tl.dot(ti, er, tl.dot(tr, -ei)) * size
        lag = N1 * N2 - grid
        tl.store(d_reverse + d * ahead + lag - 1, future.to(d_reverse.dtype.element_ty), mask=lag <= ahead)
