"""Triton kernels of `on_chip.py` for rows; those for taps are in `on_chip_taps_kernels.py`.

Shapes, tables and the steps of a transform are in `on_chip_steps.py`.
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.on_chip_steps import both, half_inverse, load_row, matrices, real_part, transform


@jit("batch", "rows", "limit")
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
    limit,
    MIRROR: tl.constexpr,
    SIDE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """out[d, b] = x[d, b] times the spectrum of channel d (its conjugate, if MIRROR: the gradient of the input).

    A program has so many rows of a channel, for which it reads the tables once. A row lies in 16 limit places.
    """
    d, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * rows
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    keep = grid < limit * 16
    factors, twiddles = matrices(f1, f2, SIDE, N1, N2), both(twiddle, N1, N2)
    lr, li = both(spectra + d * (2 * N1 * N2), N1, N2)
    if MIRROR:
        li = -li
    power = tl.load(powers + d)
    for b in range(first, tl.minimum(batch, first + rows)):
        at = (d * batch + b) * (limit * 16) + grid
        v, scale = load_row(x + at, keep)
        cr, ci = transform(v, factors, twiddles, SIDE, N1, N2)
        pr, minus_pi = (cr * lr - ci * li).to(tl.float16), (-cr * li - ci * lr).to(tl.float16)
        er, ei = half_inverse(pr, minus_pi, factors, twiddles, SIDE, N1, N2)
        y = real_part(er, ei, factors, SIDE, N1, N2)
        tl.store(out + at, (y * (power * scale)).to(out.dtype.element_ty), mask=keep)


@jit("batch", "channels", "rows", "limit")
def correlate_rows(
    g,
    x,
    sums,
    f1,
    f2,
    twiddle,
    batch,
    channels,
    rows,
    limit,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """sums[part, d] = sum over so many rows b of the spectrum of g[d, b] times the conjugate of that of x[d, b]."""
    d, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    keep = grid < limit * 16
    factors, twiddles = matrices(f1, f2, False, N1, N2), both(twiddle, N1, N2)
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for b in range(part * rows, tl.minimum(batch, part * rows + rows)):
        at = (d * batch + b) * (limit * 16) + grid
        v, size = load_row(x + at, keep)
        hr, hi = transform(v, factors, twiddles, False, N1, N2)
        hr, hi = hr.to(tl.float16), hi.to(tl.float16)  # while the next transform needs the registers
        v, scale = load_row(g + at, keep)
        gr, gi = transform(v, factors, twiddles, False, N1, N2)
        real += (hr * gr + hi * gi) * (size * scale)
        imaginary += (hr * gi - hi * gr) * (size * scale)
    at = sums + (part * channels + d) * (2 * N1 * N2) + grid
    tl.store(at, real)
    tl.store(at + N1 * N2, imaginary)


@jit("batch", "channels", "rows", "limit")
def differentiate_rows(
    g,
    x,
    out,
    sums,
    spectra,
    powers,
    f1,
    f2,
    twiddle,
    batch,
    channels,
    rows,
    limit,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """Both gradients of so many rows b of channel d, from one spectrum of g[d, b].

    out[d, b] = g[d, b] times the conjugate of the channel's spectrum, the gradient of x[d, b]; sums[part, d] = sum over
    b of the spectrum of g[d, b] times the conjugate of that of x[d, b].
    """
    d, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    grid = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    keep = grid < limit * 16
    factors, twiddles = matrices(f1, f2, True, N1, N2), both(twiddle, N1, N2)
    lr, li = both(spectra + d * (2 * N1 * N2), N1, N2)
    power = tl.load(powers + d)
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for b in range(part * rows, tl.minimum(batch, part * rows + rows)):
        at = (d * batch + b) * (limit * 16) + grid
        v, scale = load_row(g + at, keep)
        gr, gi = transform(v, factors, twiddles, True, N1, N2)
        pr, minus_pi = (gr * lr + gi * li).to(tl.float16), (gr * li - gi * lr).to(tl.float16)
        gr, gi = gr.to(tl.float16), gi.to(tl.float16)  # while what follows needs the registers
        er, ei = half_inverse(pr, minus_pi, factors, twiddles, True, N1, N2)
        y = real_part(er, ei, factors, True, N1, N2)
        tl.store(out + at, (y * (power * scale)).to(out.dtype.element_ty), mask=keep)
        v, size = load_row(x + at, keep)
        hr, hi = transform(v, factors, twiddles, True, N1, N2)
        real += (hr * gr + hi * gi) * (size * scale)
        imaginary += (hr * gi - hi * gr) * (size * scale)
    at = sums + (part * channels + d) * (2 * N1 * N2) + grid
    tl.store(at, real)
    tl.store(at + N1 * N2, imaginary)
