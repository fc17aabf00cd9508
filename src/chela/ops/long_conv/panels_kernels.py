"""Triton kernels of `panels.py`: N = N0 Ni times, n = n0 Ni + p and k = k0 + N0 q, of C channels at once.

Outer stage, over tiles of P columns p, with theta = exp(i pi / 2N) in both factors:

    A[k0, p] = sum_n0 F0[k0, n0] x[n0, p],   F0 = exp(i pi n0 / 2 N0 - 2 pi i k0 n0 / N0) / sqrt(N0)
    z[k0, p] = A W0,                         W0 = exp(i pi p / 2 N - 2 pi i k0 p / N)

Inner stage, for each k0: the Fourier transform of z[k0] over its Ni = N1 N2 points in two steps, p = n1 N2 + n2 and
q = k1 + N1 k2. Every factor is unitary. Channels are columns of the products with F0 and F1 and rows of that with F2.

Numbers of B rows and G panels lie as [B, G, 2, N0, Ni, C], real and imaginary parts in float16, over a power of two a
channel of a tile of the outer stage, scales [B, G, Ni / P, C], or of a row of the inner one, powers [B, G, N0, C].
Inner programs take E of the C channels. Tables: f0 [4, N0, N0] is F0 (real, imaginary) and its transpose; f1
[4, N1, N1] is F1 (real, -imaginary, imaginary, real), symmetric, as is f2 [2, N2, N2]; w0 [2, N0, Ni] and w1
[2, N1, N2] are twiddles.

Where 64 rows of a product are all there are, Triton 3.6 lets eight warps compute them twice if the result goes into
another product, but not if the first stands in a loop: hence the loops whose counts, `two` and `once`, are arguments.
"""

import triton.language as tl

from chela.ops.launch import jit


@jit()
def _power(most):
    """The power of two that brings largest entries to [1, 2); 2^-100 for zeros."""
    return tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1e-30))))


@jit()
def _taps(kernel, first, sign, lags, channels, d, kd, kl, inner, N0: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """kernel[d + e, first + sign (a Ni + p)] as [N0, P C]; zero where there is no such lag or channel."""
    a, e, p = tl.arange(0, N0)[:, None, None], tl.arange(0, C)[None, :, None], tl.arange(0, P)[None, None, :]
    lag = first + sign * (a * inner + p)
    keep = (lag >= 0) & (lag < lags) & (d + e < channels)
    taps = tl.load(kernel + (d + e).to(tl.int64) * kd + lag.to(tl.int64) * kl, mask=keep, other=0).to(tl.float32)
    return tl.reshape(tl.permute(taps, (0, 2, 1)), [N0, P * C])


@jit("front", "length", "ahead", "inner", "kd", "rd", "rl")
def outer_forward(
    x,
    w,
    out,
    scales,
    f0,
    w0,
    front,
    length,
    ahead,
    inner,
    channels,
    xb,
    xt,
    kd,
    kl,
    rd,
    rl,
    TAPS: tl.constexpr,
    AHEAD: tl.constexpr,
    N0: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Input x [B, length, D] with `front` zeros before it -> the outer stage; 16 inner = Ni.

    TAPS: x is a kernel [D, length] instead, and AHEAD, w holds `ahead` taps into the future, lag -l as -i at N - l.
    """
    panel, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, d = inner * 16, panel * C
    a, q = tl.arange(0, N0), tl.arange(0, P * C)
    square = a[:, None] * N0 + a[None, :]
    fr, fi = tl.load(f0 + square), tl.load(f0 + N0 * N0 + square)
    if TAPS:
        v = _taps(x, tile * P, 1, length, channels, d, kd, kl, step, N0, P, C)
    else:
        t, e = a[:, None] * step + tile * P + (q // C)[None, :] - front, (q % C)[None, :]
        keep = (t >= 0) & (t < length) & (d + e < channels)
        v = tl.load(x + b * xb + d + t.to(tl.int64) * xt + e, mask=keep, other=0).to(tl.float32)
    most = tl.max(tl.abs(v), 0)
    u = v
    if AHEAD:
        u = _taps(w, N0 * step - 1 - tile * P, -1, ahead, channels, d, rd, rl, step, N0, P, C)
        most = tl.maximum(most, tl.max(tl.abs(u), 0))
    scale = _power(tl.max(tl.reshape(most, [P, C]), 0))
    inverse = (1 / scale)[None, None, :]
    v = tl.reshape((tl.reshape(v, [N0, P, C]) * inverse).to(tl.float16), [N0, P * C])
    zr, zi = tl.dot(fr, v), tl.dot(fi, v)
    if AHEAD:
        u = tl.reshape((tl.reshape(u, [N0, P, C]) * inverse).to(tl.float16), [N0, P * C])
        zr, zi = tl.dot(fi, u, zr), tl.dot(-fr, u, zi)
    grid = a[:, None] * step + tile * P + tl.arange(0, P)[None, :]
    wr, wi = tl.load(w0 + grid)[:, :, None], tl.load(w0 + N0 * step + grid)[:, :, None]
    zr, zi = tl.reshape(zr, [N0, P, C]), tl.reshape(zi, [N0, P, C])
    br, bi = (zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16)
    row, size = b * tl.num_programs(0) + panel, N0 * step * C
    target = out + row * 2 * size + a[:, None] * (step * C) + tile * (P * C) + q[None, :]
    tl.store(target, tl.reshape(br, [N0, P * C]))
    tl.store(target + size, tl.reshape(bi, [N0, P * C]))
    tl.store(scales + (row * tl.num_programs(1) + tile) * C + tl.arange(0, C), scale)


@jit("factor", "start", "length", "ahead", "inner")
def outer_inverse(
    z,
    powers,
    out,
    future,
    f0,
    w0,
    factor,
    start,
    length,
    ahead,
    inner,
    channels,
    TAPS: tl.constexpr,
    AHEAD: tl.constexpr,
    N0: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    """Undo the outer stage: the real part at the `length` times from `start` on, times `factor`, -> out [B, length, D].

    TAPS: -> out [D, length] instead, and AHEAD, minus the imaginary part at N - l to future [D, ahead] at lag l.
    """
    panel, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, d = inner * 16, panel * C
    a, p, e, q = tl.arange(0, N0), tl.arange(0, P), tl.arange(0, C), tl.arange(0, P * C)
    row, size = b * tl.num_programs(0) + panel, N0 * step * C
    source = z + row * 2 * size + a[:, None] * (step * C) + tile * (P * C) + q[None, :]
    scale = tl.load(powers + row * (N0 * C) + a[:, None] * C + e[None, :])  # [N0, C]
    top = tl.maximum(tl.max(scale, 0), 1e-37)  # zeros have less
    ratio = (scale * (1 / top)[None, :])[:, None, :]
    zr = tl.reshape(tl.load(source).to(tl.float32), [N0, P, C]) * ratio
    zi = tl.reshape(tl.load(source + size).to(tl.float32), [N0, P, C]) * ratio
    grid = a[:, None] * step + tile * P + p[None, :]
    wr, wi = tl.load(w0 + grid)[:, :, None], tl.load(w0 + N0 * step + grid)[:, :, None]
    er = tl.reshape((zr * wr + zi * wi).to(tl.float16), [N0, P * C])
    ei = tl.reshape((zi * wr - zr * wi).to(tl.float16), [N0, P * C])
    square = a[:, None] * N0 + a[None, :]
    fr, fi = tl.load(f0 + 2 * N0 * N0 + square), tl.load(f0 + 3 * N0 * N0 + square)
    total = (top * factor)[None, None, :]
    y = tl.reshape(tl.dot(fi, ei, tl.dot(fr, er)), [N0, P, C]) * total
    if TAPS:
        lag = a[:, None, None] * step + tile * P + p[None, None, :]
        channel = (d + e)[None, :, None]
        target = out + channel.to(tl.int64) * length + lag
        y = tl.permute(y, (0, 2, 1))
        tl.store(target, y.to(out.dtype.element_ty), mask=(lag < length) & (channel < channels))
        if AHEAD:
            y = tl.permute(tl.reshape(tl.dot(fi, er, tl.dot(fr, -ei)), [N0, P, C]) * total, (0, 2, 1))
            lag = N0 * step - lag
            target = future + channel.to(tl.int64) * ahead + lag - 1
            tl.store(target, y.to(future.dtype.element_ty), mask=(lag <= ahead) & (channel < channels))
    else:
        t, channel = a[:, None] * step + tile * P + (q // C)[None, :] - start, d + (q % C)[None, :]
        target = out + b * length * channels + t.to(tl.int64) * channels + channel
        keep = (t >= 0) & (t < length) & (channel < channels)
        tl.store(target, tl.reshape(y, [N0, P * C]).to(out.dtype.element_ty), mask=keep)


@jit()
def _transform(
    z,
    scales,
    f1,
    f2,
    w1,
    two,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """Inner transform of the E channels that begin at z: [N1 E, N2], real and imaginary in float32, over powers [E]."""
    S: tl.constexpr = N2 // P
    a, c, q, s = tl.arange(0, N1), tl.arange(0, N2), tl.arange(0, N2 * E), tl.arange(0, N1 * S)
    scale = tl.load(scales + s[:, None] * C + tl.arange(0, E)[None, :])
    unit = tl.max(scale, 0)
    ratio = tl.reshape((scale * (1 / unit)[None, :]).to(tl.float16), [N1, S, 1, E])
    square = a[:, None] * N1 + a[None, :]
    source = z + a[:, None] * (N2 * C) + (q // E * C + q % E)[None, :]
    zr, zi = tl.zeros([N1, N2 * E], tl.float32), tl.zeros([N1, N2 * E], tl.float32)
    for part in range(two):  # real, imaginary
        v = tl.load(source + part * (N0 * N1 * N2 * C))
        v = tl.reshape(tl.reshape(v, [N1, S, P, E]) * ratio, [N1, N2 * E])
        zr = tl.dot(tl.load(f1 + part * (N1 * N1) + square), v, zr)
        zi = tl.dot(tl.load(f1 + (part + 2) * (N1 * N1) + square), v, zi)
    grid = a[:, None] * N2 + c[None, :]
    wr, wi = tl.load(w1 + grid)[:, :, None], tl.load(w1 + N1 * N2 + grid)[:, :, None]
    zr, zi = tl.reshape(zr, [N1, N2, E]), tl.reshape(zi, [N1, N2, E])
    br, bi = (zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16)
    br = tl.reshape(tl.permute(br, (0, 2, 1)), [N1 * E, N2])
    bi = tl.reshape(tl.permute(bi, (0, 2, 1)), [N1 * E, N2])
    square = c[:, None] * N2 + c[None, :]
    gr, gi = tl.load(f2 + square), tl.load(f2 + N2 * N2 + square)
    return tl.dot(bi, -gi, tl.dot(br, gr)), tl.dot(bi, gr, tl.dot(br, gi)), unit


@jit()
def _normalise(cr, ci, N1: tl.constexpr, N2: tl.constexpr, E: tl.constexpr):
    """[N1 E, N2] in float16, below 1 in size, and the powers of two [E] they were divided by."""
    cr, ci = tl.reshape(cr, [N1, E, N2]), tl.reshape(ci, [N1, E, N2])
    power = _power(tl.max(tl.max(tl.maximum(tl.abs(cr), tl.abs(ci)), 2), 0)) * 2
    inverse = (1 / power)[None, :, None]
    cr, ci = (cr * inverse).to(tl.float16), (ci * inverse).to(tl.float16)
    return tl.reshape(cr, [N1 * E, N2]), tl.reshape(ci, [N1 * E, N2]), power


@jit()
def _inverse(
    pr,
    pi,
    out,
    f1,
    f2,
    w1,
    once,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """Undo the inner transform of [N1 E, N2] in float16: to the E channels that begin at `out`."""
    a, c, q = tl.arange(0, N1), tl.arange(0, N2), tl.arange(0, N2 * E)
    square = c[:, None] * N2 + c[None, :]
    gr, gi = tl.load(f2 + square), tl.load(f2 + N2 * N2 + square)
    dr, di = tl.dot(pi, gi, tl.dot(pr, gr)), tl.dot(pr, -gi, tl.dot(pi, gr))
    grid = a[:, None] * N2 + c[None, :]
    wr, wi = tl.load(w1 + grid)[:, None, :], tl.load(w1 + N1 * N2 + grid)[:, None, :]
    dr, di = tl.reshape(dr, [N1, E, N2]), tl.reshape(di, [N1, E, N2])
    er, ei = (dr * wr + di * wi).to(tl.float16), (di * wr - dr * wi).to(tl.float16)
    er = tl.reshape(tl.permute(er, (0, 2, 1)), [N1, N2 * E])
    ei = tl.reshape(tl.permute(ei, (0, 2, 1)), [N1, N2 * E])
    square = a[:, None] * N1 + a[None, :]
    fr, minus, fi = tl.load(f1 + square), tl.load(f1 + N1 * N1 + square), tl.load(f1 + 2 * N1 * N1 + square)
    yr, yi = tl.zeros([N1, N2 * E], tl.float32), tl.zeros([N1, N2 * E], tl.float32)
    for _ in range(once):
        yr, yi = tl.dot(fr, er, yr), tl.dot(fr, ei, yi)
    for _ in range(once):
        yr, yi = tl.dot(fi, ei, yr), tl.dot(minus, er, yi)
    target = out + a[:, None] * (N2 * C) + (q // E * C + q % E)[None, :]
    tl.store(target, yr.to(tl.float16))
    tl.store(target + N0 * N1 * N2 * C, yi.to(tl.float16))


@jit("two")
def inner_spectra(
    z,
    scales,
    out,
    powers,
    f1,
    f2,
    w1,
    two,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """The inner transform of a kernel's panels -> out [G, 2, N0, N1, C, N2], over powers [G, N0, C]."""
    panel, e, k0 = tl.program_id(0).to(tl.int64) // (C // E), tl.program_id(0) % (C // E) * E, tl.program_id(1)
    SIZE: tl.constexpr = N1 * N2 * C
    at = panel * (2 * N0 * SIZE) + k0 * SIZE
    cr, ci, unit = _transform(z + at + e, scales + panel * (SIZE // P) + e, f1, f2, w1, two, N0, N1, N2, P, C, E)
    cr, ci, power = _normalise(cr, ci, N1, N2, E)
    q = tl.arange(0, N1 * E)
    target = out + at + ((q // E * C + q % E + e) * N2)[:, None] + tl.arange(0, N2)[None, :]
    tl.store(target, cr)
    tl.store(target + N0 * SIZE, ci)
    tl.store(powers + (panel * N0 + k0) * C + e + tl.arange(0, E), unit * power)


@jit("two", "once", "panels")
def inner_convolve(
    z,
    scales,
    after,
    spectra,
    powers,
    f1,
    f2,
    w1,
    two,
    once,
    panels,
    MIRROR: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """Every row of z times its channel's spectrum (its conjugate, if MIRROR), in place, over `after` [B, G, N0, C]."""
    row, e, k0 = tl.program_id(0).to(tl.int64) // (C // E), tl.program_id(0) % (C // E) * E, tl.program_id(1)
    panel = row % panels
    SIZE: tl.constexpr = N1 * N2 * C
    z += row * (2 * N0 * SIZE) + k0 * SIZE + e
    cr, ci, unit = _transform(z, scales + row * (SIZE // P) + e, f1, f2, w1, two, N0, N1, N2, P, C, E)
    q, c = tl.arange(0, N1 * E), tl.arange(0, E)
    source = spectra + panel * (2 * N0 * SIZE) + k0 * SIZE + ((q // E * C + q % E + e) * N2)[:, None]
    source += tl.arange(0, N2)[None, :]
    lr, li = tl.load(source).to(tl.float32), tl.load(source + N0 * SIZE).to(tl.float32)
    if MIRROR:
        li = -li
    tl.store(after + (row * N0 + k0) * C + e + c, unit * tl.load(powers + (panel * N0 + k0) * C + e + c))
    pr, pi = (cr * lr - ci * li).to(tl.float16), (cr * li + ci * lr).to(tl.float16)
    _inverse(pr, pi, z, f1, f2, w1, once, N0, N1, N2, C, E)


@jit("two", "once", "batch")
def inner_correlate(
    g,
    g_scales,
    x,
    x_scales,
    out,
    after,
    f1,
    f2,
    w1,
    two,
    once,
    batch,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """Sum over the batch of the spectrum of g times the conjugate of that of x, back to before the inner transform."""
    panel, e, k0 = tl.program_id(0).to(tl.int64) // (C // E), tl.program_id(0) % (C // E) * E, tl.program_id(1)
    panels = tl.num_programs(0) // (C // E)
    SIZE: tl.constexpr = N1 * N2 * C
    real, imaginary = tl.zeros([N1 * E, N2], tl.float32), tl.zeros([N1 * E, N2], tl.float32)
    for b in range(batch):
        row = b * panels + panel
        at, to = row * (2 * N0 * SIZE) + k0 * SIZE + e, row * (SIZE // P) + e
        zero = (b // batch) * 16  # keeps the tables' loads in the loop: before it, they would fill the registers
        hr, hi, unit = _transform(x + at, x_scales + to, f1 + zero, f2 + zero, w1 + zero, two, N0, N1, N2, P, C, E)
        hr, hi = hr.to(tl.float16), hi.to(tl.float16)
        gr, gi, more = _transform(g + at, g_scales + to, f1 + zero, f2 + zero, w1 + zero, two, N0, N1, N2, P, C, E)
        both = (unit * more)[None, :, None]
        real += tl.reshape(tl.reshape(hr * gr + hi * gi, [N1, E, N2]) * both, [N1 * E, N2])
        imaginary += tl.reshape(tl.reshape(hr * gi - hi * gr, [N1, E, N2]) * both, [N1 * E, N2])
    pr, pi, power = _normalise(real, imaginary, N1, N2, E)
    tl.store(after + (panel * N0 + k0) * C + e + tl.arange(0, E), power)
    _inverse(pr, pi, out + panel * (2 * N0 * SIZE) + k0 * SIZE + e, f1, f2, w1, once, N0, N1, N2, C, E)
