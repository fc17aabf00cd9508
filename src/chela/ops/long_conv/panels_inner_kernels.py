"""Triton kernels of `panels.py`: the inner stage, on numbers that lie as `panels_outer_kernels.py` says.

For each k0 the Fourier transform of z[k0] over its Ni = N1 N2 points in two steps, p = n1 N2 + n2 and q = k1 + N1 k2.
Every factor is unitary. Channels are columns of the product with F1 and rows of that with F2; a program takes E of the
C channels. Tables: f1 [4, N1, N1] is F1 (real, -imaginary, imaginary, real), symmetric, as is f2 [2, N2, N2]; w1
[2, N1, N2] are twiddles.

Where 64 rows of a product are all there are, Triton 3.6 lets eight warps compute them twice if the result goes into
another product, but not if the first stands in a loop: hence the loops whose counts, `two` and `once`, are arguments.
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.on_chip_steps import power_below


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
    power = power_below(tl.max(tl.max(tl.maximum(tl.abs(cr), tl.abs(ci)), 2), 0)) * 2
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
