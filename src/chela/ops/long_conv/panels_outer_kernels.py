"""Triton kernels of `panels.py`: the outer stage, over tiles of P columns p, and the layout of what lies between.

N = N0 Ni times, n = n0 Ni + p and k = k0 + N0 q, of W channels at once. With theta = exp(i pi / 2N) in both factors:

    A[k0, p] = sum_n0 F0[k0, n0] x[n0, p],   F0 = exp(i pi n0 / 2 N0 - 2 pi i k0 n0 / N0) / sqrt(N0)
    z[k0, p] = A W0,                         W0 = exp(i pi p / 2 N - 2 pi i k0 p / N)

Every factor is unitary; channels are columns of the products with F0. Long transforms take two steps, N0 = M1 M:
n0 = a M + b and k0 = u + M1 v with F0 = G1 T G2, as F1, W and F2 of `on_chip_steps.py`, and stay in order.

The channels of B rows lie in G panels of C, [B, G, 2, N0, Ni, C], real and imaginary parts in float16, over a power of
two a channel of a tile of the outer stage, scales [B, G, Ni / P, C], or of a row of the inner one, powers
[B, G, N0, C]. A program of the outer stage writes or reads W / C panels. Tables, real parts and imaginary ones: w0
[2, N0, Ni] is W0; f0 [4, M1, M1] is G1 and its transpose, or F0 with M = 1; g0 [2, M, M] is G2, symmetric, and t0
[2, M1, M] is T, if M > 1.
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.on_chip_steps import power_below


@jit()
def _taps(kernel, first, sign, lags, channels, d, kd, kl, inner, N0: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """kernel[d + e, first + sign (a Ni + p)] as [N0, P W]; zero where there is no such lag or channel."""
    a, e, p = tl.arange(0, N0)[:, None, None], tl.arange(0, W)[None, :, None], tl.arange(0, P)[None, None, :]
    lag = first + sign * (a * inner + p)
    keep = (lag >= 0) & (lag < lags) & (d + e < channels)
    taps = tl.load(kernel + (d + e).to(tl.int64) * kd + lag.to(tl.int64) * kl, mask=keep, other=0).to(tl.float32)
    return tl.reshape(tl.permute(taps, (0, 2, 1)), [N0, P * W])


@jit()
def _places(size, tile, P: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Where the entries (p, channel) [P W] of a tile stand, from the beginning of a row of the first panel on."""
    q = tl.arange(0, P * W)
    if W == C:
        at = tile * (P * W) + q
    else:
        at = (q % W // C) * (2 * size) + (tile * P + q // W) * C + q % C
        at = tl.max_contiguous(tl.multiple_of(at, C), C)
    return at


@jit()
def _table(pointer, R: tl.constexpr, C: tl.constexpr):
    """Real and imaginary part of a matrix [2, R, C]."""
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(pointer + at), tl.load(pointer + R * C + at)


@jit()
def _transform(v, f0, g0, t0, N0: tl.constexpr, M: tl.constexpr, Q: tl.constexpr):
    """F0 v of a real tile [N0, Q] in float16: real and imaginary part in float32."""
    M1: tl.constexpr = N0 // M
    fr, fi = _table(f0, M1, M1)
    v = tl.reshape(v, [M1, M * Q])
    zr, zi = tl.dot(fr, v), tl.dot(fi, v)
    if M > 1:
        tr, ti = _table(t0, M1, M)
        tr, ti = tr[:, :, None], ti[:, :, None]
        zr, zi = tl.reshape(zr, [M1, M, Q]), tl.reshape(zi, [M1, M, Q])
        br, bi = (zr * tr - zi * ti).to(tl.float16), (zr * ti + zi * tr).to(tl.float16)
        br = tl.reshape(tl.permute(br, (1, 0, 2)), [M, M1 * Q])
        bi = tl.reshape(tl.permute(bi, (1, 0, 2)), [M, M1 * Q])
        gr, gi = _table(g0, M, M)
        zr, zi = tl.dot(-gi, bi, tl.dot(gr, br)), tl.dot(gi, br, tl.dot(gr, bi))
    return tl.reshape(zr, [N0, Q]), tl.reshape(zi, [N0, Q])


@jit()
def _real_part(er, ei, f0, g0, t0, N0: tl.constexpr, M: tl.constexpr, Q: tl.constexpr):
    """Of a tile [N0, Q] in float16 whose F0 is undone, in float32."""
    M1: tl.constexpr = N0 // M
    if M > 1:
        er, ei = tl.reshape(er, [M, M1 * Q]), tl.reshape(ei, [M, M1 * Q])
        gr, gi = _table(g0, M, M)
        dr, di = tl.dot(gi, ei, tl.dot(gr, er)), tl.dot(-gi, er, tl.dot(gr, ei))
        tr, ti = _table(t0, M1, M)
        tr, ti = tl.trans(tr)[:, :, None], tl.trans(ti)[:, :, None]
        dr, di = tl.reshape(dr, [M, M1, Q]), tl.reshape(di, [M, M1, Q])
        er, ei = (dr * tr + di * ti).to(tl.float16), (di * tr - dr * ti).to(tl.float16)
        er, ei = tl.permute(er, (1, 0, 2)), tl.permute(ei, (1, 0, 2))
    er, ei = tl.reshape(er, [M1, M * Q]), tl.reshape(ei, [M1, M * Q])
    fr, fi = _table(f0 + 2 * M1 * M1, M1, M1)
    return tl.reshape(tl.dot(fi, ei, tl.dot(fr, er)), [N0, Q])


@jit("front", "length", "ahead", "inner", "kd", "rd", "rl")
def outer_forward(
    x,
    w,
    out,
    scales,
    f0,
    g0,
    t0,
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
    M: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Input x [B, length, D] with `front` zeros before it -> the outer stage; 16 inner = Ni.

    TAPS: x is a kernel [D, length] instead, and AHEAD, w holds `ahead` taps into the future, lag -l as -i at N - l.
    """
    group, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, d = inner * 16, group * W
    a, e, q = tl.arange(0, N0), tl.arange(0, W), tl.arange(0, P * W)
    if TAPS:
        v = _taps(x, tile * P, 1, length, channels, d, kd, kl, step, N0, P, W)
    else:
        t, channel = a[:, None] * step + tile * P + (q // W)[None, :] - front, (q % W)[None, :]
        keep = (t >= 0) & (t < length) & (d + channel < channels)
        v = tl.load(x + b * xb + d + t.to(tl.int64) * xt + channel, mask=keep, other=0).to(tl.float32)
    most = tl.max(tl.abs(v), 0)
    u = v
    if AHEAD:
        u = _taps(w, N0 * step - 1 - tile * P, -1, ahead, channels, d, rd, rl, step, N0, P, W)
        most = tl.maximum(most, tl.max(tl.abs(u), 0))
    scale = power_below(tl.max(tl.reshape(most, [P, W]), 0))
    inverse = (1 / scale)[None, None, :]
    v = tl.reshape((tl.reshape(v, [N0, P, W]) * inverse).to(tl.float16), [N0, P * W])
    zr, zi = _transform(v, f0, g0, t0, N0, M, P * W)
    if AHEAD:
        u = tl.reshape((tl.reshape(u, [N0, P, W]) * inverse).to(tl.float16), [N0, P * W])
        ur, ui = _transform(u, f0, g0, t0, N0, M, P * W)
        zr, zi = zr + ui, zi - ur
    grid = a[:, None] * step + tile * P + tl.arange(0, P)[None, :]
    wr, wi = tl.load(w0 + grid)[:, :, None], tl.load(w0 + N0 * step + grid)[:, :, None]
    zr, zi = tl.reshape(zr, [N0, P, W]), tl.reshape(zi, [N0, P, W])
    br, bi = (zr * wr - zi * wi).to(tl.float16), (zr * wi + zi * wr).to(tl.float16)
    first, size = (b * tl.num_programs(0) + group) * (W // C), N0 * step * C
    target = out + first * 2 * size + a[:, None] * (step * C) + _places(size, tile, P, C, W)[None, :]
    tl.store(target, tl.reshape(br, [N0, P * W]))
    tl.store(target + size, tl.reshape(bi, [N0, P * W]))
    tl.store(scales + ((first + e // C) * tl.num_programs(1) + tile) * C + e % C, scale)


@jit("factor", "start", "length", "ahead", "inner")
def outer_inverse(
    z,
    powers,
    out,
    future,
    f0,
    g0,
    t0,
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
    M: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Undo the outer stage: the real part at the `length` times from `start` on, times `factor`, -> out [B, length, D].

    TAPS: -> out [D, length] instead, and AHEAD, minus the imaginary part at N - l to future [D, ahead] at lag l.
    """
    group, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    step, d = inner * 16, group * W
    a, p, e, q = tl.arange(0, N0), tl.arange(0, P), tl.arange(0, W), tl.arange(0, P * W)
    first, size = (b * tl.num_programs(0) + group) * (W // C), N0 * step * C
    source = z + first * 2 * size + a[:, None] * (step * C) + _places(size, tile, P, C, W)[None, :]
    scale = tl.load(powers + (first + e // C)[None, :] * (N0 * C) + a[:, None] * C + (e % C)[None, :])  # [N0, W]
    top = tl.maximum(tl.max(scale, 0), 1e-37)  # zeros have less
    ratio = (scale * (1 / top)[None, :])[:, None, :]
    zr = tl.reshape(tl.load(source).to(tl.float32), [N0, P, W]) * ratio
    zi = tl.reshape(tl.load(source + size).to(tl.float32), [N0, P, W]) * ratio
    grid = a[:, None] * step + tile * P + p[None, :]
    wr, wi = tl.load(w0 + grid)[:, :, None], tl.load(w0 + N0 * step + grid)[:, :, None]
    er = tl.reshape((zr * wr + zi * wi).to(tl.float16), [N0, P * W])
    ei = tl.reshape((zi * wr - zr * wi).to(tl.float16), [N0, P * W])
    total = (top * factor)[None, None, :]
    y = tl.reshape(_real_part(er, ei, f0, g0, t0, N0, M, P * W), [N0, P, W]) * total
    if TAPS:
        lag = a[:, None, None] * step + tile * P + p[None, None, :]
        channel = (d + e)[None, :, None]
        target = out + channel.to(tl.int64) * length + lag
        y = tl.permute(y, (0, 2, 1))
        tl.store(target, y.to(out.dtype.element_ty), mask=(lag < length) & (channel < channels))
        if AHEAD:
            y = tl.reshape(_real_part(-ei, er, f0, g0, t0, N0, M, P * W), [N0, P, W]) * total
            y = tl.permute(y, (0, 2, 1))
            lag = N0 * step - lag
            target = future + channel.to(tl.int64) * ahead + lag - 1
            tl.store(target, y.to(future.dtype.element_ty), mask=(lag <= ahead) & (channel < channels))
    else:
        t, channel = a[:, None] * step + tile * P + (q // W)[None, :] - start, d + (q % W)[None, :]
        target = out + b * length * channels + t.to(tl.int64) * channels + channel
        keep = (t >= 0) & (t < length) & (channel < channels)
        tl.store(target, tl.reshape(y, [N0, P * W]).to(out.dtype.element_ty), mask=keep)
