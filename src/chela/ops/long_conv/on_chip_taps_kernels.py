"""Triton kernels of `on_chip.py` for taps, alone or beside a pass that transposes.

A program for every channel leaves most of a GPU idle and takes longer than one that transposes: it comes first.
"""

import triton.language as tl

from chela.ops.launch import jit
from chela.ops.long_conv.kernels import turn_block, turn_block_back
from chela.ops.long_conv.on_chip_steps import both, half_inverse, matrices, power_of, real_part, transform


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
    SIDE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
):
    """spectra[d] = sqrt(N) times the transform of the taps, over a power of two powers[d]; lag -l is -i at N - l."""
    _transform_taps(
        tl.program_id(0), kernel, reverse, spectra, powers, lags, ahead, kd, kl, rd, rl, f1, f2, twiddle,
        AHEAD, SIDE, N1, N2,
    )  # fmt: skip


@jit("length", "batch", "front", "limit", "blocks", "lags", "ahead", "kd", "rd", "rl")
def to_rows_beside_taps(
    x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, blocks,
    kernel, reverse, spectra, powers, lags, ahead, kd, kl, rd, rl, f1, f2, twiddle,
    AHEAD: tl.constexpr, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`transform_taps` by the first programs, and `to_blocks` of so many blocks by the others, which hide them."""
    program = tl.program_id(0)
    if program < width:
        _transform_taps(
            program, kernel, reverse, spectra, powers, lags, ahead, kd, kl, rd, rl, f1, f2, twiddle,
            AHEAD, SIDE, N1, N2,
        )  # fmt: skip
    else:
        part, tile = (program - width) % blocks, (program - width) // blocks
        turn_block(part, tile, x, out, length, batch, width, front, limit, xb, xt, xd, ob, oi, od, BLOCK, CHANNELS)


@jit()
def _transform_taps(
    channel, kernel, reverse, spectra, powers, lags, ahead, kd, kl, rd, rl, f1, f2, twiddle,
    AHEAD: tl.constexpr, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """A program's part of `transform_taps`.

    Parts are below 1/2, so that no number of the product with a row is larger than the row's.
    """
    d = channel.to(tl.int64)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    v = tl.load(kernel + d * kd + grid.to(tl.int64) * kl, mask=grid < lags, other=0).to(tl.float32)
    w = v
    if AHEAD:
        lag = N1 * N2 - grid
        w = tl.load(reverse + d * rd + (lag - 1).to(tl.int64) * rl, mask=lag <= ahead, other=0).to(tl.float32)
    scale = power_of(v, w)
    factors, twiddles = matrices(f1, f2, SIDE, N1, N2), both(twiddle, N1, N2)
    cr, ci = transform((v / scale).to(tl.float16), factors, twiddles, SIDE, N1, N2)
    if AHEAD:
        er, ei = transform((w / scale).to(tl.float16), factors, twiddles, SIDE, N1, N2)
        cr, ci = cr + ei, ci - er
    top = 4 * power_of(cr, ci)
    at = spectra + d * (2 * N1 * N2) + grid
    tl.store(at, cr / top)
    tl.store(at + N1 * N2, ci / top)
    tl.store(powers + d, scale * top * tl.sqrt((N1 * N2) * 1.0))


@jit("parts", "lags", "ahead")
def collect_rows(
    sums, d_kernel, d_reverse, lags, ahead, parts, width, f1, f2, twiddle,
    AHEAD: tl.constexpr, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    """Gradients of the taps: the real part of the inverse transform at lag l, and minus the imaginary one at N - l."""
    _collect_rows(
        tl.program_id(0), sums, d_kernel, d_reverse, lags, ahead, parts, width, f1, f2, twiddle, AHEAD, SIDE, N1, N2
    )


@jit("length", "batch", "front", "limit", "blocks", "lags", "ahead", "parts")
def from_rows_beside_taps(
    rows, out, length, batch, width, front, limit, bb, bi, bd, o_b, o_t, blocks,
    sums, d_kernel, d_reverse, lags, ahead, parts, f1, f2, twiddle,
    AHEAD: tl.constexpr, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`collect_rows` by the first programs, and `from_blocks` of so many blocks by the others, which hide them."""
    program = tl.program_id(0)
    if program < width:
        _collect_rows(
            program, sums, d_kernel, d_reverse, lags, ahead, parts, width, f1, f2, twiddle, AHEAD, SIDE, N1, N2
        )
    else:
        part, tile = (program - width) % blocks, (program - width) // blocks
        turn_block_back(
            part, tile, rows, out, length, batch, width, front, limit, bb, bi, bd, o_b, o_t, BLOCK, CHANNELS
        )


@jit()
def _collect_rows(
    channel, sums, d_kernel, d_reverse, lags, ahead, parts, width, f1, f2, twiddle,
    AHEAD: tl.constexpr, SIDE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
):  # fmt: skip
    d = channel.to(tl.int64)
    a, c = tl.arange(0, N1), tl.arange(0, N2)
    grid = a[:, None] * N2 + c[None, :]
    real, imaginary = tl.zeros([N1, N2], tl.float32), tl.zeros([N1, N2], tl.float32)
    for part in range(parts):
        at = sums + (part * width + d) * (2 * N1 * N2) + grid
        real += tl.load(at)
        imaginary += tl.load(at + N1 * N2)
    top = power_of(real, imaginary)
    factors, twiddles = matrices(f1, f2, SIDE, N1, N2), both(twiddle, N1, N2)
    er, ei = half_inverse(
        (real / top).to(tl.float16), (-imaginary / top).to(tl.float16), factors, twiddles, SIDE, N1, N2
    )
    size = top * tl.sqrt((N1 * N2) * 1.0)
    past = real_part(er, ei, factors, SIDE, N1, N2) * size
    tl.store(d_kernel + d * lags + grid, past.to(d_kernel.dtype.element_ty), mask=grid < lags)
    if AHEAD:
        future = real_part(-ei, er, factors, SIDE, N1, N2) * size
        lag = N1 * N2 - grid
        tl.store(d_reverse + d * ahead + lag - 1, future.to(d_reverse.dtype.element_ty), mask=lag <= ahead)
