"""Triton kernels of `panels.py`: the outer stage, over tiles of P columns p, and the layout of what lies between.

N = N0 Ni times, n = n0 Ni + p and k = k0 + N0 q, of C channels at once. With theta = exp(i pi / 2N) in both factors:

    A[k0, p] = sum_n0 F0[k0, n0] x[n0, p],   F0 = exp(i pi n0 / 2 N0 - 2 pi i k0 n0 / N0) / sqrt(N0)
    z[k0, p] = A W0,                         W0 = exp(i pi p / 2 N - 2 pi i k0 p / N)

Every factor is unitary; channels are columns of the products with F0.

Numbers of B rows and G panels lie as [B, G, 2, N0, Ni, C], real and imaginary parts in float16, over a power of two a
channel of a tile of the outer stage, scales [B, G, Ni / P, C], or of a row of the inner one, powers [B, G, N0, C].
Tables: f0 [4, N0, N0] is F0 (real, imaginary) and its transpose; w0 [2, N0, Ni] are twiddles.
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.on_chip_steps import power_below


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
    scale = power_below(tl.max(tl.reshape(most, [P, C]), 0))
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
